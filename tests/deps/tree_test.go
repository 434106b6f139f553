package deps

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// root is the module's directory, as seen from this package's.
const root = "../.."

// source is one parsed Go file.
type source struct {
	path  string // below root, with slashes
	lines int
	ast   *ast.File
}

// dir is the directory that the file is in, which is its package's path in the module.
func (s source) dir() string { return path.Dir(s.path) }

// test reports whether the file is no part of the program.
func (s source) test() bool {
	return strings.HasSuffix(s.path, "_test.go") || strings.HasPrefix(s.path, "tests/")
}

// fset is shared by all files, so that a position tells its file.
var fset = token.NewFileSet()

// read parses the module once for all tests.
var read = sync.OnceValues(func() ([]source, error) {
	var all []source
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		if d.IsDir() {
			// tools is a module of its own; the rest is not source.
			if rel != "." && strings.HasPrefix(rel, ".") || rel == "bin" || rel == "tools" || d.Name() == "testdata" {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(rel, ".go") {
			return nil
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		file, err := parser.ParseFile(fset, rel, text, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return fmt.Errorf("parse: %w", err)
		}
		all = append(all, source{path: rel, lines: strings.Count(string(text), "\n"), ast: file})
		return nil
	})
	return all, err
})

// tree gives every Go file of the module.
func tree(t *testing.T) []source {
	t.Helper()
	all, err := read()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 100 {
		t.Fatalf("only %d Go files found below %s", len(all), root)
	}
	return all
}

// at gives a position as file:line.
func at(n ast.Node) string {
	p := fset.Position(n.Pos())
	return fmt.Sprintf("%s:%d", p.Filename, p.Line)
}
