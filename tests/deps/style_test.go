package deps

import (
	"go/ast"
	"go/parser"
	"go/token"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// maxLines is for tests too: a longer file has more than one subject.
const maxLines = 800

func TestFilesAreShort(t *testing.T) {
	for _, f := range tree(t) {
		if f.lines > maxLines {
			t.Errorf("%s has %d lines: split it by subject (at most %d)", f.path, f.lines, maxLines)
		}
	}
}

func TestPackagesAreDocumented(t *testing.T) {
	documented := map[string]bool{}
	for _, f := range tree(t) {
		documented[f.dir()] = documented[f.dir()] || f.ast.Doc != nil
	}
	for dir, ok := range documented {
		if !ok {
			t.Errorf("%s: no file has a package comment that says what the package is for", dir)
		}
	}
}

func TestExportedNamesAreDocumented(t *testing.T) {
	for _, f := range tree(t) {
		if strings.HasSuffix(f.path, "_test.go") {
			continue
		}
		for _, name := range undocumented(f.ast) {
			t.Errorf("%s: exported %s has no doc comment", at(name), name.Name)
		}
	}
}

// undocumented gives the exported names of a file that have no comment. One
// comment may serve a group of constants or variables.
func undocumented(file *ast.File) []*ast.Ident {
	var bare []*ast.Ident
	note := func(name *ast.Ident, docs ...*ast.CommentGroup) {
		for _, doc := range docs {
			if doc != nil {
				return
			}
		}
		if name.IsExported() {
			bare = append(bare, name)
		}
	}
	for _, decl := range file.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			if d.Recv == nil || ast.IsExported(receiver(d)) {
				note(d.Name, d.Doc)
			}
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				switch s := spec.(type) {
				case *ast.TypeSpec:
					note(s.Name, s.Doc, d.Doc)
				case *ast.ValueSpec:
					for _, name := range s.Names {
						note(name, s.Doc, s.Comment, d.Doc)
					}
				}
			}
		}
	}
	return bare
}

// receiver is the name of a method's type.
func receiver(d *ast.FuncDecl) string {
	expr := d.Recv.List[0].Type
	for {
		switch e := expr.(type) {
		case *ast.StarExpr:
			expr = e.X
		case *ast.IndexExpr:
			expr = e.X
		case *ast.IndexListExpr:
			expr = e.X
		case *ast.Ident:
			return e.Name
		default:
			return ""
		}
	}
}

// mayExit are the functions outside of tests that may end the process.
var mayExit = map[string]string{
	"cmd/pgha/main.go main":       "it returns the command's exit status",
	"lab/init.go MaybeInit":       "in a host's first process there is no main to return to",
	"tests/packages/main.go main": "it returns the command's exit status",
}

func TestNoPackageEndsTheProcess(t *testing.T) {
	for _, f := range tree(t) {
		if strings.HasSuffix(f.path, "_test.go") {
			continue
		}
		for _, decl := range f.ast.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if ok && mayExit[f.path+" "+fn.Name.Name] != "" {
				continue
			}
			ast.Inspect(decl, func(n ast.Node) bool {
				if call, ok := n.(*ast.CallExpr); ok && ends(callee(call)) {
					t.Errorf("%s: %s: return an error instead", at(call), callee(call))
				}
				return true
			})
		}
	}
}

func ends(callee string) bool {
	return callee == "panic" || callee == "os.Exit" || strings.HasPrefix(callee, "log.Fatal") || strings.HasPrefix(callee, "log.Panic")
}

var skips = regexp.MustCompile(`^(t|tb|b|m)\.Skip`)

// TestTestsWaitForConditions refuses sleeping where it stands for a condition.
// Between two looks at the condition, in a loop, it is in its place.
func TestTestsWaitForConditions(t *testing.T) {
	for _, f := range tree(t) {
		if !f.test() {
			continue
		}
		for _, call := range sleeps(f.ast) {
			t.Errorf("%s: time.Sleep outside of a loop: wait for a condition, with a deadline", at(call))
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if call, ok := n.(*ast.CallExpr); ok && skips.MatchString(callee(call)) {
				t.Errorf("%s: %s: what a test needs is installed for it", at(call), callee(call))
			}
			return true
		})
	}
}

// sleeps gives the calls of time.Sleep in n that are in no loop.
func sleeps(n ast.Node) []*ast.CallExpr {
	var found []*ast.CallExpr
	ast.Inspect(n, func(m ast.Node) bool {
		switch m := m.(type) {
		case *ast.ForStmt, *ast.RangeStmt:
			return false
		case *ast.CallExpr:
			if callee(m) == "time.Sleep" {
				found = append(found, m)
			}
		}
		return true
	})
	return found
}

// callee is the name that is called, with its package or variable if it has one.
func callee(call *ast.CallExpr) string {
	switch fn := call.Fun.(type) {
	case *ast.Ident:
		return fn.Name
	case *ast.SelectorExpr:
		if x, ok := fn.X.(*ast.Ident); ok {
			return x.Name + "." + fn.Sel.Name
		}
	}
	return ""
}

var leftForLater = regexp.MustCompile(`\b(TODO|FIXME|XXX|HACK)\b`)

func TestNothingIsLeftForLater(t *testing.T) {
	for _, f := range tree(t) {
		for _, group := range f.ast.Comments {
			if word := leftForLater.FindString(group.Text()); word != "" {
				t.Errorf("%s: %s: do it, or file it", at(group), word)
			}
		}
	}
}

// TestRules shows that the rules find what they are for.
func TestRules(t *testing.T) {
	const text = `package p

import "time"

// Documented is.
type Documented struct{}

func (d *Documented) Bare() {}

func (hidden) Method() {}

type Plain int

const (
	One = 1 // the first
	Two = 2
)

func wait() {
	time.Sleep(1)
	for { time.Sleep(2) }
	panic(1)
}
`
	file, err := parser.ParseFile(token.NewFileSet(), "p.go", text, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, name := range undocumented(file) {
		names = append(names, name.Name)
	}
	if diff := cmp.Diff([]string{"Bare", "Plain", "Two"}, names); diff != "" {
		t.Errorf("undocumented names (-want +got):\n%s", diff)
	}
	if got := len(sleeps(file)); got != 1 {
		t.Errorf("%d sleeps outside of loops, want 1", got)
	}
	for name, want := range map[string]bool{"panic": true, "os.Exit": true, "log.Fatalf": true, "log.Print": false, "t.Fatal": false} {
		if ends(name) != want {
			t.Errorf("%s ends the process: %v, want %v", name, !want, want)
		}
	}
}
