package deps

import (
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "pgha/"

// middle are the packages that know one thing each, and not of each other.
var middle = []string{"cluster", "embedded", "firewall", "gate", "haproxy", "patroni", "pki", "postgres", "sqladmin", "supervisor", "systemd"}

// part is the part of the tree that a package belongs to.
func part(dir string) string {
	if dir == "lab/testbed" {
		return dir
	}
	first, _, _ := strings.Cut(dir, "/")
	return first
}

// mayImport holds the import direction between parts of the tree:
//
//	cmd → node → middle → internal, with assets a leaf beside internal
//	cmd, tests → lab/testbed → lab → internal
func mayImport(from, to string) bool {
	if from == to {
		return true
	}
	switch from {
	case "internal", "assets":
		return false
	case "lab":
		return to == "internal"
	case "lab/testbed": // drives the daemons of a lab's hosts
		return to == "lab" || to == "node" || to == "internal"
	case "node":
		return slices.Contains(middle, to) || to == "internal" || to == "assets"
	case "cmd":
		return to != "tests"
	case "tests":
		return to != "cmd"
	}
	if slices.Contains(middle, from) {
		return to == "internal" || to == "assets" || from == "cluster" && to == "pki"
	}
	return false // a new part has to get its place here first
}

// mayImportInTest is mayImport for test files, which may use what tests share.
func mayImportInTest(from, to string) bool {
	return mayImport(from, to) || to == "tests" || to == "lab"
}

func TestImportDirection(t *testing.T) {
	for _, f := range tree(t) {
		may := mayImport
		if strings.HasSuffix(f.path, "_test.go") {
			may = mayImportInTest
		}
		for _, spec := range f.ast.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			to, ours := strings.CutPrefix(imported, module)
			if ours && !may(part(f.dir()), part(to)) {
				t.Errorf("%s: %s must not import %s", at(spec), f.dir(), imported)
			}
		}
	}
}

func TestMayImport(t *testing.T) {
	for _, c := range []struct {
		from, to string
		want     bool
	}{
		{"cmd", "node", true},
		{"cmd", "lab/testbed", true},
		{"cmd", "tests", false},
		{"node", "cluster", true},
		{"node", "cmd", false},
		{"node", "lab", false},
		{"node", "lab/testbed", false},
		{"cluster", "pki", true},
		{"pki", "cluster", false},
		{"patroni", "supervisor", false},
		{"embedded", "node", false},
		{"systemd", "internal", true},
		{"haproxy", "assets", true},
		{"haproxy", "tests", false},
		{"internal", "pki", false},
		{"internal", "internal", true},
		{"assets", "internal", false},
		{"lab", "node", false},
		{"lab/testbed", "node", true},
		{"lab/testbed", "pki", false},
		{"tests", "pki", true},
		{"tests", "cmd", false},
		{"unheard-of", "internal", false},
	} {
		if got := mayImport(c.from, c.to); got != c.want {
			t.Errorf("%s may import %s: %v, want %v", c.from, c.to, got, c.want)
		}
	}
	if !mayImportInTest("embedded", "tests") || mayImportInTest("embedded", "pki") {
		t.Error("a middle package's tests may use what tests share, and no other middle package")
	}
}
