package firewall

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"pgha/internal/nftwatch"
)

// table is the one table that this package writes.
var table = &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}

// Firewall writes rulesets into the kernel and watches over them. Its methods
// may be called from several goroutines.
type Firewall struct {
	log   *slog.Logger
	netns int // file descriptor of a network namespace, 0 for the process's own

	mu      sync.Mutex // one transaction at a time
	applied *Ruleset   // what the kernel should hold; nil before the first Apply
}

// Option changes how a Firewall works.
type Option func(*Firewall)

// InNetNS makes the Firewall work in the network namespace that fd refers to.
// fd must stay open as long as the Firewall is used.
func InNetNS(fd int) Option {
	return func(f *Firewall) { f.netns = fd }
}

// New makes a Firewall. It fails where the kernel has no nf_tables or the
// process has no CAP_NET_ADMIN; it changes nothing.
func New(log *slog.Logger, opts ...Option) (*Firewall, error) {
	f := &Firewall{log: log.With("component", "firewall")}
	for _, opt := range opts {
		opt(f)
	}
	err := f.transaction(context.Background(), func(conn *nftables.Conn) error {
		_, err := conn.ListTablesOfFamily(table.Family)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read nftables tables: %w", err)
	}
	return f, nil
}

// Apply makes the kernel hold the compiled policy, in one atomic batch that
// replaces the table "inet pgha" and touches nothing else, and reads the result
// back. Where the kernel holds it already, nothing is written and the counters
// keep their values; otherwise they start from zero. After an error from the
// kernel the old table is still in force.
func (f *Firewall) Apply(ctx context.Context, p Policy) error {
	r, err := Compile(p)
	if err != nil {
		return fmt.Errorf("compile firewall policy: %w", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.transaction(ctx, func(conn *nftables.Conn) error {
		diff, err := difference(conn, r)
		if err != nil {
			return fmt.Errorf("read firewall table: %w", err)
		}
		if diff == "" {
			f.applied = &r
			return nil
		}
		if err := replace(conn, r); err != nil {
			return fmt.Errorf("write firewall table: %w", err)
		}
		// From here on this is what the kernel should hold, even if the check
		// below finds that somebody has changed it in the meantime.
		f.applied = &r
		f.log.Info("firewall table written", "mode", p.Mode, "members", len(p.Members),
			"clients", len(p.Clients), "probes", len(p.Probes), "join_open", p.JoinOpen, "because", diff)
		if diff, err = difference(conn, r); err != nil {
			return fmt.Errorf("read firewall table back: %w", err)
		}
		if diff != "" {
			return fmt.Errorf("verify firewall table: the kernel does not hold what was written: %s", diff)
		}
		return nil
	})
}

// Remove deletes the table. A table that is not there is no error.
func (f *Firewall) Remove(ctx context.Context) error {
	if err := f.Apply(ctx, Policy{Mode: ModeOff}); err != nil {
		return fmt.Errorf("remove firewall table: %w", err)
	}
	return nil
}

// InSync reports whether the kernel holds exactly what the last Apply or Remove
// wrote. It is false before the first.
func (f *Firewall) InSync(ctx context.Context) (bool, error) {
	diff, err := f.drift(ctx)
	return err == nil && diff == "", err
}

// drift tells how the kernel's table differs from what was applied last.
func (f *Firewall) drift(ctx context.Context) (diff string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.applied == nil {
		return "no policy has been applied yet", nil
	}
	err = f.transaction(ctx, func(conn *nftables.Conn) error {
		diff, err = difference(conn, *f.applied)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("read firewall table: %w", err)
	}
	return diff, nil
}

// Counter is what a rule has matched since the table was written.
type Counter struct {
	Packets uint64
	Bytes   uint64
}

// Counters gives what was dropped, by counter: drop_postgres, drop_api and so
// on. The map is empty when there is no table.
func (f *Firewall) Counters(ctx context.Context) (map[string]Counter, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	counters := map[string]Counter{}
	err := f.transaction(ctx, func(conn *nftables.Conn) error {
		objects, err := conn.GetNamedObjects(table)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, o := range objects {
			named, ok := o.(*nftables.NamedObj)
			if !ok {
				continue
			}
			if c, ok := named.Obj.(*expr.Counter); ok {
				counters[named.Name] = Counter{Packets: c.Packets, Bytes: c.Bytes}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read firewall counters: %w", err)
	}
	return counters, nil
}

// transaction runs do with a connection of its own: a connection is a buffer of
// messages, and two users of one would mix their batches.
func (f *Firewall) transaction(ctx context.Context, do func(*nftables.Conn) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	conn, err := nftables.New(nftables.WithNetNSFd(f.netns), nftables.AsLasting())
	if err != nil {
		return fmt.Errorf("connect to nf_tables: %w", nftwatch.Explain(err))
	}
	return errors.Join(nftwatch.Explain(do(conn)), conn.CloseLasting())
}

// replace sends the ruleset as one batch. Adding the table first makes its
// deletion valid whether or not it was there.
func replace(conn *nftables.Conn, r Ruleset) error {
	conn.AddTable(table)
	conn.DelTable(table)
	if r.Off() {
		return conn.Flush()
	}
	conn.AddTable(table)
	for _, name := range r.Counters {
		conn.AddObj(&nftables.NamedObj{Table: table, Name: name, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}})
	}
	for _, s := range r.Sets {
		set := &nftables.Set{Table: table, Name: s.Name, KeyType: s.keyType, Interval: s.Interval}
		if err := conn.AddSet(set, s.encoded); err != nil {
			return fmt.Errorf("encode set %s: %w", s.Name, err)
		}
	}
	policy := nftables.ChainPolicyAccept
	chain := conn.AddChain(&nftables.Chain{
		Table: table, Name: chainName, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookInput, Priority: &chainPriority, Policy: &policy,
	})
	for _, rule := range r.Rules {
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: rule.exprs})
	}
	return conn.Flush()
}
