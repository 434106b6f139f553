package faults

import (
	"os"
	"testing"

	"pgha/lab"
	"pgha/tests/undertest"
)

// bin is the program under test: PGHA_BIN, or one that is built here.
var bin string

func TestMain(m *testing.M) {
	lab.MaybeInit()
	os.Exit(undertest.Main(m, &bin))
}
