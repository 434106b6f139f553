package systemd_test

import (
	"os"
	"testing"

	"pgha/tests/undertest"
)

// bin is the program under test: PGHA_BIN, or one that is built here.
var bin string

func TestMain(m *testing.M) {
	os.Exit(undertest.Main(m, &bin))
}
