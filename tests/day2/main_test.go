// Package day2 tests what operators do with a cluster that runs, each test on
// a cluster of its own, under the load of a client that writes all the time.
package day2

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
