package cluster

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"pgha/embedded"
	"pgha/internal/fsx"
)

// memberDirEnv makes this test binary run the member whose configuration is in
// that directory, until its standard input ends.
const memberDirEnv = "PGHA_TEST_MEMBER_DIR"

// childConfig is the part of a configuration that a child needs.
type childConfig struct {
	Name, DataDir, PeerURL, Cert, CA, Token, FatalFile string
	InitialCluster                                     map[string]string
	Bootstrap                                          bool
	WALSegmentBytes                                    int64
}

func writeConfig(t *testing.T, dir string, c embedded.Config) {
	t.Helper()
	child := childConfig{
		Name: c.Name, DataDir: c.DataDir, PeerURL: c.PeerURL, Cert: c.CertFile, CA: c.CAFile, Token: c.Token,
		FatalFile: c.FatalFile, InitialCluster: c.InitialCluster, Bootstrap: c.Bootstrap, WALSegmentBytes: c.WALSegmentBytes,
	}
	if err := fsx.WriteJSON(filepath.Join(dir, "config.json"), child, 0o600); err != nil {
		t.Fatal(err)
	}
}

func readConfig(dir string) (embedded.Config, error) {
	var c childConfig
	err := fsx.ReadJSON(filepath.Join(dir, "config.json"), &c)
	return embedded.Config{
		Name: c.Name, DataDir: c.DataDir, PeerURL: c.PeerURL, CertFile: c.Cert, KeyFile: c.Cert, CAFile: c.CA,
		Token: c.Token, FatalFile: c.FatalFile, InitialCluster: c.InitialCluster, Bootstrap: c.Bootstrap,
		WALSegmentBytes: c.WALSegmentBytes,
	}, err
}

// startChild runs a member in a process of its own, killed at the end of the test.
func startChild(t *testing.T, cfg embedded.Config) *os.Process {
	t.Helper()
	dir := t.TempDir()
	writeConfig(t, dir, cfg)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), memberDirEnv+"="+dir)
	cmd.Stderr = &testLog{t: t, name: "child"}
	stdin, err := cmd.StdinPipe() // ends with us, should we be killed
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
	})
	return cmd.Process
}

func runMember(dir string) int {
	cfg, err := readConfig(dir)
	if err == nil {
		var s *embedded.Server
		if s, err = embedded.Start(context.Background(), cfg); err == nil {
			_, _ = io.Copy(io.Discard, os.Stdin)
			s.Stop()
			return 0
		}
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}
