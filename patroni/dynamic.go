package patroni

// MaxLagOnFailover is how far behind, in bytes, a replica may be and still be
// promoted when replication is asynchronous.
const MaxLagOnFailover = mib

// BootstrapDynamic is the dynamic configuration of a new cluster. Patroni
// writes it at its own bootstrap; for an adopted data directory it has to be
// written before Patroni starts.
func BootstrapDynamic(c Config) map[string]any { return bootstrapDCS(c) }
