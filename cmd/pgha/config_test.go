package main

import (
	"strings"
	"testing"

	"pgha/node"
)

func TestDangers(t *testing.T) {
	for _, c := range []struct {
		name    string
		diff    node.ConfigDiff
		restart bool
		want    string // "" = nothing is asked
	}{
		{"a parameter", node.ConfigDiff{Key: "postgresql.work_mem", New: "9MB"}, false, ""},
		{"another network", node.ConfigDiff{Key: "clients", Old: "10.0.0.0/16", New: "10.0.0.0/16, 10.9.0.0/16"}, false, ""},
		{"a wider network", node.ConfigDiff{Key: "clients", Old: "10.0.0.0/16", New: "10.0.0.0/8"}, false, ""},
		{"a network is gone", node.ConfigDiff{Key: "clients", Old: "10.0.0.0/16, 10.9.0.0/16, fd00::/64", New: "10.0.0.0/16"}, false, "Clients from 10.9.0.0/16 and fd00::/64 cannot"},
		{"a narrower network", node.ConfigDiff{Key: "clients", Old: "10.0.0.0/8", New: "10.0.0.0/16"}, false, "Clients from 10.0.0.0/8 cannot"},
		{"everybody of another family", node.ConfigDiff{Key: "clients", Old: "fd00::/64", New: "0.0.0.0/0"}, false, "Clients from fd00::/64 cannot"},
		{"asynchronous", node.ConfigDiff{Key: "async", Old: "off", New: "on"}, false, "may lose"},
		{"synchronous", node.ConfigDiff{Key: "async", Old: "on", New: "off"}, false, ""},
		{"rules", node.ConfigDiff{Key: "hba", Old: "hostssl a b all cert"}, false, "who may log in"},
		{"a restart", node.ConfigDiff{Key: "postgresql.work_mem", New: "9MB"}, true, "restarts"},
	} {
		got := strings.Join(dangers(node.ConfigPlan{Diff: []node.ConfigDiff{c.diff}}, c.restart), "\n")
		if c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	if got := dangers(node.ConfigPlan{}, true); len(got) > 0 {
		t.Errorf("nothing changes, and it asks: %q", got)
	}
}

func TestCheckNode(t *testing.T) {
	v := node.ConfigView{Nodes: []string{"n1", "n2"}}
	for _, name := range []string{"", "n2"} {
		if err := checkNode(v, name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	if err := checkNode(v, "n3"); err == nil || !strings.Contains(err.Error(), `no data node "n3": use one of n1, n2`) {
		t.Errorf("a node that is none: %v", err)
	}
}
