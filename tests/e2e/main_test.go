// Package e2e tests pgha as its users run it: the real program on hosts in
// network namespaces, with real PostgreSQL, Patroni, HAProxy, etcd and nftables,
// and real clients. Tests assert order and safety, never speed.
package e2e

import (
	"context"
	"os"
	"testing"
	"time"

	"pgha/lab"
	"pgha/lab/testbed"
	"pgha/tests/undertest"
)

// bin is the program under test: PGHA_BIN, or one that is built here.
var bin string

func TestMain(m *testing.M) {
	lab.MaybeInit()
	os.Exit(undertest.Main(m, &bin))
}

// newBed makes an empty lab that ends with the test.
func newBed(t *testing.T) *testbed.Bed {
	t.Helper()
	return undertest.Bed(t, bin)
}

// within bounds one wait of a test, generously: it is there to end a test that
// hangs, not to measure.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	return undertest.Within(t, d)
}
