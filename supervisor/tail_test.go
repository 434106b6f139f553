package supervisor

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// testTail is a tail without its goroutine, and the writer's end of its file.
func testTail(t *testing.T, s Spec) (*tail, *os.File, *capture) {
	t.Helper()
	s, err := s.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(s.RunDir, 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := openOutput(s)
	if err != nil {
		t.Fatal(err)
	}
	logs := &capture{}
	tl := &tail{spec: s, log: slog.New(logs), collapse: true}
	tl.poll(false)
	t.Cleanup(func() { tl.close(); _ = out.Close() })
	return tl, out, logs
}

func write(t *testing.T, w io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
}

// canCollapse reports whether the file system of dir can cut off the start of a
// file.
func canCollapse(t *testing.T, dir string) bool {
	t.Helper()
	f, err := os.CreateTemp(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	var sfs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &sfs); err != nil {
		t.Fatal(err)
	}
	write(t, f, strings.Repeat("x", int(sfs.Bsize)+1))
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_COLLAPSE_RANGE, 0, sfs.Bsize) == nil
}

// A writer that never pauses loses no line where the start of a file can be cut
// off; elsewhere it must not write in the moment of the truncation, and does not
// here. Either way the files together are what was written.
func TestRotationLosesNothing(t *testing.T) {
	const lines = 60_000
	for _, collapse := range []bool{true, false} {
		t.Run(fmt.Sprintf("collapse %v", collapse), func(t *testing.T) {
			s := testSpec(t, "")
			s.LogMax, s.LogKeep = minLogMax, 1000
			tl, out, logs := testTail(t, s)
			tl.collapse = collapse
			free := collapse && canCollapse(t, filepath.Dir(s.LogFile))
			var pause sync.Mutex
			written := make(chan error, 1)
			go func() {
				var err error
				for i := 0; i < lines && err == nil; i++ {
					if !free {
						pause.Lock()
					}
					_, err = fmt.Fprintf(out, "line %d of the output, with some more text to it\n", i)
					if !free {
						pause.Unlock()
					}
				}
				written <- err
			}()
			poll := func() {
				pause.Lock()
				defer pause.Unlock()
				tl.poll(false)
			}
			for done := false; !done; {
				select {
				case err := <-written:
					if err != nil {
						t.Fatal(err)
					}
					done = true
				default:
				}
				poll()
			}
			waitFor(t, "the last line", func() bool { poll(); return len(logs.output()) >= lines })
			got := logs.output()
			if len(got) != lines {
				t.Errorf("%d lines, want %d", len(got), lines)
			}
			for i, l := range got {
				if l != fmt.Sprintf("line %d of the output, with some more text to it", i) {
					t.Fatalf("line %d is %q", i, l)
				}
			}
			checkFiles(t, s, strings.Join(got, "\n")+"\n")
			if tl.collapse != free {
				t.Errorf("cutting off the start: %v, want %v", tl.collapse, free)
			}
		})
	}
}

// checkFiles compares the rotated files and the current one with text.
func checkFiles(t *testing.T, s Spec, text string) {
	t.Helper()
	var all strings.Builder
	n := 0
	for i := s.LogKeep; i >= 0; i-- {
		name := s.LogFile
		if i > 0 {
			name = fmt.Sprintf("%s.%d", s.LogFile, i)
		}
		data, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		n++
		all.Write(data)
	}
	if n < 4 {
		t.Errorf("only %d files: too few rotations to prove anything", n)
	}
	if all.String() != text {
		t.Errorf("the files hold %d bytes that are not the %d bytes written", all.Len(), len(text))
	}
}

func TestRotationKeepsSoMany(t *testing.T) {
	s := testSpec(t, "")
	s.LogMax, s.LogKeep = minLogMax, 2
	tl, out, _ := testTail(t, s)
	for range 5 {
		write(t, out, strings.Repeat(strings.Repeat("x", 1023)+"\n", 70))
		tl.poll(false)
	}
	files, err := filepath.Glob(s.LogFile + "*")
	if d := cmp.Diff([]string{s.LogFile, s.LogFile + ".1", s.LogFile + ".2"}, files); d != "" || err != nil {
		t.Errorf("files (-want +got):\n%s %v", d, err)
	}
	if st, err := os.Stat(s.LogFile); err != nil || st.Size() >= s.LogMax {
		t.Errorf("size of the log file %d, %v", st.Size(), err)
	}
}

func TestTailGoesOnWhereTheLastOneStood(t *testing.T) {
	s := testSpec(t, "")
	tl, out, logs := testTail(t, s)
	write(t, out, "one\ntwo\nhal")
	tl.poll(false)
	tl.close()
	write(t, out, "f\nfour\n")
	next, _, nextLogs := testTail(t, s)
	next.poll(false)
	if d := cmp.Diff([]string{"one", "two"}, logs.output()); d != "" {
		t.Errorf("first (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]string{"half", "four"}, nextLogs.output()); d != "" {
		t.Errorf("next (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]string{"one", "two", "half", "four"}, next.last()); d != "" {
		t.Errorf("last lines (-want +got):\n%s", d)
	}
}

func TestTailStartsAtTheEndOfAnUnknownFile(t *testing.T) {
	s := testSpec(t, "")
	if err := os.MkdirAll(filepath.Dir(s.LogFile), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.LogFile, []byte("of last year\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tl, out, logs := testTail(t, s)
	write(t, out, "of today\n")
	tl.poll(false)
	if d := cmp.Diff([]string{"of today"}, logs.output()); d != "" {
		t.Errorf("lines (-want +got):\n%s", d)
	}
}

func TestTailFollowsTruncationAndReplacement(t *testing.T) {
	s := testSpec(t, "")
	tl, out, logs := testTail(t, s)
	write(t, out, "a long line before it is truncated\n")
	tl.poll(false)
	if err := out.Truncate(0); err != nil {
		t.Fatal(err)
	}
	write(t, out, "short\n")
	tl.poll(false)
	if err := os.Rename(s.LogFile, s.LogFile+".moved"); err != nil {
		t.Fatal(err)
	}
	tl.poll(false)
	write(t, out, "to the moved file\n")
	if err := os.WriteFile(s.LogFile, []byte("in the new one\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tl.poll(false)
	want := []string{"a long line before it is truncated", "short", "to the moved file", "in the new one"}
	if d := cmp.Diff(want, logs.output()); d != "" {
		t.Errorf("lines (-want +got):\n%s", d)
	}
}

func TestTailSplitsAndCleansLines(t *testing.T) {
	s := testSpec(t, "")
	tl, out, logs := testTail(t, s)
	write(t, out, "\n\r\ncr\r\n\xff\n"+strings.Repeat("x", maxLine+10)+"\nlast")
	tl.poll(false)
	tl.poll(true)
	want := []string{"cr", "\uFFFD", strings.Repeat("x", maxLine), strings.Repeat("x", 10), "last"}
	if d := cmp.Diff(want, logs.output()); d != "" {
		t.Errorf("lines (-want +got):\n%s", d)
	}
	for i := range 3 * lastLines {
		write(t, out, fmt.Sprintln(i))
	}
	tl.poll(false)
	if l := tl.last(); len(l) != lastLines || l[lastLines-1] != fmt.Sprint(3*lastLines-1) {
		t.Errorf("last lines %q", l)
	}
}

// Whoever may write to the directory must not make us open another file.
func TestOutputIsNoSymlink(t *testing.T) {
	s := testSpec(t, "")
	target := filepath.Join(t.TempDir(), "shadow")
	if err := os.MkdirAll(filepath.Dir(s.LogFile), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, s.LogFile); err != nil {
		t.Fatal(err)
	}
	if f, err := openOutput(s); err == nil {
		_ = f.Close()
		t.Error("a symbolic link was followed")
	}
	if _, err := os.Stat(target); err == nil {
		t.Error("its target was made")
	}
}
