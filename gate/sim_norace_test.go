//go:build !race

package gate

// How many schedules a run plays, and after how many a rule counts as not missed.
const simSchedules, mutationSchedules = 100_000, 40_000
