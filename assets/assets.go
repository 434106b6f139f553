// Package assets holds the files that are built into the binary. It imports
// nothing of the product.
package assets

import "embed"

// Templates holds the configuration templates of the programs that pgha runs.
//
//go:embed *.tmpl
var Templates embed.FS

// PatroniLauncher is the program that starts Patroni before 3.1.2.
//
//go:embed patroni_launcher.py
var PatroniLauncher []byte

// PrePromote is the program that Patroni runs before each promotion.
//
//go:embed pre_promote.py
var PrePromote []byte
