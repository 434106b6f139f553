package pgdata

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestReadPIDFile(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadPIDFile(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a file: %v, want fs.ErrNotExist", err)
	}
	for _, c := range []struct {
		name, text string
		want       PIDFile
		wrong      bool
	}{
		{name: "complete", text: "4711\n/data\n1700000000\n5442\n/run/x\n*\n  5432001     32771\nready   \n",
			want: PIDFile{PID: 4711, Start: 1700000000, HasShm: true, ShmKey: 5432001, ShmID: 32771}},
		{name: "negative key", text: "4711\n/data\n1700000000\n5442\n\n\n18446744073709551615         7\n",
			want: PIDFile{PID: 4711, Start: 1700000000, HasShm: true, ShmKey: -1, ShmID: 7}},
		{name: "before its shared memory", text: "4711\n/data\n1700000000\n5442\n/run/x\n", want: PIDFile{PID: 4711, Start: 1700000000}},
		{name: "first line alone", text: "4711\n", want: PIDFile{PID: 4711}},
		{name: "odd later lines", text: "4711\n/data\nsoon\n\n\n\nkey id\n", want: PIDFile{PID: 4711}},
		{name: "single user", text: "-4711\n/data\n1700000000\n", want: PIDFile{PID: -4711, Start: 1700000000}},
		{name: "empty", text: "", wrong: true},
		{name: "zero", text: "0\n", wrong: true},
		{name: "init", text: "1\n", wrong: true},
		{name: "words", text: "postmaster\n", wrong: true},
	} {
		if err := os.WriteFile(filepath.Join(dir, "postmaster.pid"), []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := ReadPIDFile(dir)
		if (err != nil) != c.wrong {
			t.Errorf("%s: error %v", c.name, err)
		}
		if diff := cmp.Diff(c.want, got, cmpopts.IgnoreUnexported(PIDFile{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
		if again, err := ReadPIDFile(dir); !c.wrong && (err != nil || again != got) {
			t.Errorf("%s: the same file gives %+v, %v", c.name, again, err)
		}
	}
}

func TestWorksIn(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cat")
	cmd.Dir = dir
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	check := func(when, dir string, want bool) {
		t.Helper()
		if got, err := WorksIn(pid, dir); err != nil || got != want {
			t.Errorf("%s: works in %s: %v, %v, want %v", when, dir, got, err, want)
		}
	}
	check("alive", dir, true)
	check("alive", link, true)
	check("alive", filepath.Dir(dir), false)
	check("alive", filepath.Join(dir, "absent"), false)
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	check("ended", dir, false)
}
