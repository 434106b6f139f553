package main

import (
	"strings"
	"testing"
)

func TestFlagsFirst(t *testing.T) {
	for typed, want := range map[string]string{
		"pgha switchover n2 --timeout 5m":              "pgha switchover --timeout 5m n2",
		"pgha switchover n2 --timeout=5m --json":       "pgha switchover --timeout=5m --json n2",
		"pgha switchover --at +2h n2":                  "pgha switchover --at +2h n2",
		"pgha maintenance enter n1 --reason x":         "pgha maintenance enter --reason x n1",
		"pgha join TOKEN --witness --yes":              "pgha join --witness --yes TOKEN",
		"pgha config set a=-1 b-=2 --dry-run":          "pgha config set --dry-run a=-1 b-=2",
		"pgha user create app -- --odd":                "pgha user create -- app --odd",
		"pgha join --token-file - --yes":               "pgha join --token-file - --yes",
		"pgha switchover n2 --bogus":                   "pgha switchover --bogus n2",
		"pgha switchover n2 --timeout":                 "pgha switchover --timeout n2",
		"pgha psql -c SELECT --node n1":                "pgha psql -c SELECT --node n1",
		"pgha --help":                                  "pgha --help",
		"pgha":                                         "pgha",
		"pgha switchover n --generate-bash-completion": "pgha switchover n --generate-bash-completion",
	} {
		if got := strings.Join(flagsFirst(newApp(), strings.Fields(typed)), " "); got != want {
			t.Errorf("%q became %q, want %q", typed, got, want)
		}
	}
}
