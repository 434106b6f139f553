package patroni

import "fmt"

const (
	mib = 1 << 20
	gib = 1 << 30
)

// size returns n bytes in PostgreSQL's notation, in whole megabytes.
func size(n uint64) string { return fmt.Sprintf("%dMB", n/mib) }

func clamp[T int | uint64](n, lo, hi T) T { return max(lo, min(n, hi)) }

// memory and disk stand in for a host whose size is not known.
func (c Config) memory() uint64 {
	if c.MemoryBytes == 0 {
		return 2 * gib
	}
	return c.MemoryBytes
}

func (c Config) disk() uint64 {
	if c.DiskBytes == 0 {
		return 20 * gib
	}
	return c.DiskBytes
}

// maxConnections grows with memory: each connection may take tens of megabytes
// once it sorts, and beyond some hundreds a pooler serves better.
func (c Config) maxConnections() int {
	return clamp(int(c.memory()/(32*mib)), 60, 500)
}

// localSizing returns the parameters that each node sets for its own size.
func (c Config) localSizing() map[string]any {
	mem, cpus := c.memory(), max(1, c.CPUs)
	maxWAL := clamp(c.disk()/20, 128*mib, 16*gib)
	return map[string]any{
		"shared_buffers":       size(clamp(mem/4, 64*mib, 64*gib)),
		"effective_cache_size": size(max(mem*7/10, 128*mib)),
		// A quarter of memory if every connection sorts at once.
		"work_mem":             size(clamp(mem/4/uint64(c.maxConnections()), 4*mib, 64*mib)),
		"maintenance_work_mem": size(clamp(mem/16, 64*mib, 2*gib)),
		"min_wal_size":         size(clamp(maxWAL/4, 80*mib, gib)),
		"max_wal_size":         size(maxWAL),
		// A standby that is gone holds WAL back up to this, not until the disk is full.
		"max_slot_wal_keep_size":          size(max(c.disk()/3, 128*mib)),
		"max_parallel_workers":            itoa(cpus),
		"max_parallel_workers_per_gather": itoa(clamp(cpus/2, 1, 4)),
	}
}

// sharedSizing returns the parameters that a standby must not have smaller than
// its primary. They are set once, when the cluster is made.
func (c Config) sharedSizing() map[string]any {
	return map[string]any{
		"max_connections":       itoa(c.maxConnections()),
		"max_worker_processes":  itoa(max(8, c.CPUs)),
		"max_wal_senders":       "10",
		"max_replication_slots": "10",
		"wal_level":             "replica",
		"hot_standby":           "on",
		"wal_log_hints":         "on",
		"wal_keep_size":         size(clamp(c.disk()/20, 64*mib, gib)),
	}
}
