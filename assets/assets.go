// Package assets holds the files that are built into the binary. It imports
// nothing of the product.
package assets

import "embed"

// Templates holds the configuration templates of the programs that pgha runs.
//
//go:embed *.tmpl
var Templates embed.FS
