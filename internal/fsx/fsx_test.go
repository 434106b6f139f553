package fsx

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestWriteFileReplacesWholeAndSetsMode(t *testing.T) {
	p := filepath.Join(t.TempDir(), "a")
	for _, content := range []string{"first, the longer one", "second"} {
		if err := WriteFile(p, []byte(content), 0o600, Keep, Keep); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(p)
		if err != nil || string(got) != content {
			t.Fatalf("read %q, %v; want %q", got, err, content)
		}
	}
	st, err := os.Stat(p)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v; want 0600", st.Mode(), err)
	}
	left, err := os.ReadDir(filepath.Dir(p))
	if err != nil || len(left) != 1 {
		t.Fatalf("%d files left in the directory, %v; want 1", len(left), err)
	}
}

func TestWriteFileFailureKeepsOldContent(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "target")
	// A directory in the place of the target makes the rename fail.
	if err := os.MkdirAll(filepath.Join(p, "child"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(p, []byte("x"), 0o600, Keep, Keep); err == nil {
		t.Fatal("no error although the target is a directory")
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 {
		t.Fatalf("temporary file left behind: %v, %v", left, err)
	}
}

func TestReadJSONMissing(t *testing.T) {
	var v any
	if err := ReadJSON(filepath.Join(t.TempDir(), "none"), &v); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("got %v, want fs.ErrNotExist", err)
	}
}
