// Command crash stands for a pgha that passes every check and then fails: asked
// to run the node, it ends at once, or does nothing for ever where its version
// ends in -rc1.
package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

var version = "v0.0.0"

func main() {
	switch args := os.Args[1:]; {
	case slices.Equal(args, []string{"version", "--json"}):
		fmt.Printf(`{"program": "pgha", "version": %q}`, version)
	case slices.Equal(args, []string{"run", "--check"}):
	case strings.HasSuffix(version, "-rc1"):
		for { // an empty select would be found to be a deadlock, and end
			time.Sleep(time.Hour)
		}
	default:
		panic("this is a broken pgha")
	}
}
