//go:build race

package gate

// The race detector makes each schedule ten times as long, and there is but one
// goroutine in it.
const simSchedules = 1_000
