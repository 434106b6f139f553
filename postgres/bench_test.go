package postgres

import "testing"

// BenchmarkProveGone is the price of a proof without a pid file: two looks at
// every process of the host.
func BenchmarkProveGone(b *testing.B) {
	dir := b.TempDir()
	for b.Loop() {
		if gone, err := ProveGone(dir); err != nil || !gone {
			b.Fatal(gone, err)
		}
	}
}
