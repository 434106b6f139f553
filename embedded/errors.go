package embedded

import "errors"

// Causes for which Start fails or a running member ends; test with errors.Is.
// The error around them says what was found and what to do.
var (
	// ErrConfig means that a field of Config is missing or wrong.
	ErrConfig = errors.New("invalid etcd configuration")
	// ErrCorrupt means that the data directory is damaged.
	ErrCorrupt = errors.New("etcd data is damaged")
	// ErrDiskFull means that there is too little space to run on.
	ErrDiskFull = errors.New("no space for etcd")
	// ErrIO means that the disk failed to read or write.
	ErrIO = errors.New("etcd cannot use its disk")
	// ErrPortInUse means that another process listens on a configured port.
	ErrPortInUse = errors.New("etcd port in use")
	// ErrAddress means that a configured address is not on this host.
	ErrAddress = errors.New("etcd address not on this host")
	// ErrInUse means that another process has the data directory open.
	ErrInUse = errors.New("etcd data directory in use")
	// ErrOtherCluster means that the data, or the members that were asked,
	// belong to another cluster.
	ErrOtherCluster = errors.New("etcd data or members of another cluster")
	// ErrNeedsRejoin means that the cluster knows this member as one that has
	// run, but its data is gone: it must be removed and added again.
	ErrNeedsRejoin = errors.New("etcd member lost its data")
	// ErrNotMember means that the cluster does not list this member (yet).
	ErrNotMember = errors.New("not a member of the etcd cluster")
	// ErrNoPeer means that no member answered. Trying again may help.
	ErrNoPeer = errors.New("no etcd member answers")
	// ErrRemoved means that this member was removed from the cluster.
	ErrRemoved = errors.New("etcd member was removed from the cluster")
	// ErrInternal means that etcd failed in a way that has no better name.
	ErrInternal = errors.New("etcd failed")
	// ErrStopped means that the server was stopped.
	ErrStopped = errors.New("etcd is stopped")
)
