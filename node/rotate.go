package node

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"pgha/cluster"
	"pgha/internal/fsx"
	"pgha/patroni"
	"pgha/pki"
	"pgha/supervisor"
)

// follower is what the reconciler has done for changes of secrets and of the CA
// that are not confirmed yet. It may be done again after a restart.
type follower struct {
	step   int64 // of the CA, that loaded is about
	loaded map[string]bool
	why    string // what the confirmation waits for
}

// readRotations reads what this node has to follow.
func (n *Node) readRotations(ctx context.Context, store *cluster.Store, w *world) (err error) {
	if w.CA, _, err = store.CAState(ctx, n.sealing); err != nil {
		return err
	}
	w.Taken, err = store.TakenBy(ctx)
	return err
}

func (n *Node) caStepFile() string { return filepath.Join(n.paths.PKI(), "ca.step") }

// caStep is the last state of the CA that this node has followed.
func (n *Node) caStep() (int64, error) {
	data, err := os.ReadFile(n.caStepFile())
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read step of the CA: %w", err)
	}
	step, err := strconv.ParseInt(string(bytes.TrimSpace(data)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read step of the CA: %s is damaged: %w", n.caStepFile(), err)
	}
	return step, nil
}

// followCA brings the files of the CA to what the cluster has agreed on. What
// uses them follows in confirm, and by the renewal of certificates.
func (n *Node) followCA(w world) error {
	if w.CA == nil {
		return nil
	}
	last, err := n.caStep()
	if err != nil {
		return err
	}
	if w.CA.Step < last {
		// Whoever can write to etcd, a witness too, could bring back a CA that was
		// taken out of trust for a reason.
		return fmt.Errorf("etcd holds step %d of the CA and this node has followed step %d already, so it stays with what it has: was etcd put back from an old snapshot? Then rotate the CA again (pgha rotate ca)", w.CA.Step, last)
	}
	if n.sealing != nil {
		// Before the certificate: a node that stops in between cannot sign, and
		// goes on here.
		if old, err := os.ReadFile(n.paths.sealedCAKey()); err != nil || !bytes.Equal(old, w.CA.Keys[0]) {
			if err := writeSecret(n.paths.sealedCAKey(), w.CA.Keys[0]); err != nil {
				return fmt.Errorf("write CA key: %w", err)
			}
		}
	}
	trust := w.CA.Trust()
	if n.sealing == nil {
		// A data node gives itself certificates of the CA that signs in this same
		// round; a witness has to be let in to get one.
		if err := n.trustsItself(w.CA); err != nil {
			return err
		}
	}
	if old, err := os.ReadFile(n.pki.CAPath()); err != nil || !bytes.Equal(old, trust) {
		if err := n.pki.WriteCA(trust); err != nil {
			return err
		}
		n.log.Info("CA certificates replaced", "step", w.CA.Step, "phase", string(w.CA.Phase))
	}
	if w.CA.Step == last {
		return nil
	}
	return fsx.WriteFile(n.caStepFile(), fmt.Appendln(nil, w.CA.Step), 0o600, fsx.Keep, fsx.Keep)
}

// trustsItself refuses a state under which this node would not believe its own
// certificates, and so never start again.
func (n *Node) trustsItself(s *cluster.CAState) error {
	for _, r := range n.cfg.Role.Roles() {
		b, err := n.pki.Bundle(r)
		if err != nil {
			return fmt.Errorf("check certificate %s before the trusted CAs change: %w", r, err)
		}
		// The bundle holds the CA that has signed it.
		if !pki.SameTrust(b.CAPEM, s.Certs[0]) && (len(s.Certs) < 2 || !pki.SameTrust(b.CAPEM, s.Certs[1])) {
			by, _ := pki.Fingerprint(b.CAPEM) // it was parsed
			return fmt.Errorf("step %d of the CA does not trust the CA %s, which has signed this node's certificate %s, so this node stays with what it has: if it does not get on with the others any more, run pgha member replace %s on a data node and do what it says", s.Step, by, r, n.cfg.Name)
		}
	}
	return nil
}

// confirm tells the cluster that every part of this node uses the present
// secrets and CAs, once that is so. Until then it says what is missing.
func (n *Node) confirm(ctx context.Context, w world) error {
	want := w.Taken[n.cfg.Name]
	if w.CA != nil {
		want.CA = w.CA.Step
	}
	if w.Secrets != nil {
		want.Secrets = w.Secrets.Generation
	}
	if w.Viewed && want != w.Taken[n.cfg.Name] {
		why, err := n.unconfirmed(ctx, w)
		n.setUnconfirmed(why)
		if err != nil || why != "" {
			return err
		}
		store := n.store.Load()
		if store == nil {
			return nil // the next round
		}
		ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		return store.PutTaken(ctx, n.cfg.Name, want)
	}
	n.setUnconfirmed("")
	return n.forgetPasswords(ctx, w)
}

func (n *Node) setUnconfirmed(why string) {
	n.mu.Lock()
	n.rotation.why = why
	n.mu.Unlock()
}

// unconfirmed does what is left to do and says what that waits for; "" when
// there is nothing left.
func (n *Node) unconfirmed(ctx context.Context, w world) (string, error) {
	if w.CA != nil && w.Taken[n.cfg.Name].CA != w.CA.Step {
		if last, err := n.caStep(); err != nil || last < w.CA.Step {
			return "it has not taken the CA certificates (see its problems)", err
		}
		due, err := n.dueCertificates(w, time.Now())
		if err != nil || len(due) > 0 {
			return "its certificates are being reissued", err
		}
		if n.cfg.Role == cluster.RoleData {
			if why, err := n.loadTrust(ctx, w); err != nil || why != "" {
				return why, err
			}
		}
		if why := n.etcdTrustDiffers(); why != "" {
			return why, nil
		}
	}
	if w.Secrets != nil && w.Taken[n.cfg.Name].Secrets != w.Secrets.Generation {
		return n.patroniTakes(ctx, w)
	}
	return "", nil
}

// loadTrust has the children read certificates and CAs again. Each is told once
// a step.
func (n *Node) loadTrust(ctx context.Context, w world) (string, error) {
	if n.rotation.step != w.CA.Step || n.rotation.loaded == nil {
		n.rotation.step, n.rotation.loaded = w.CA.Step, map[string]bool{}
	}
	once := func(part string, f func() error) error {
		if n.rotation.loaded[part] {
			return nil
		}
		if err := f(); err != nil {
			return fmt.Errorf("load CA certificates into %s: %w", part, err)
		}
		n.rotation.loaded[part] = true
		return nil
	}
	err := errors.Join(
		once("PostgreSQL", func() error { return n.reloadPostgres(ctx) }),
		once("HAProxy", func() error {
			if n.haproxy.Status().State != supervisor.Running {
				return nil // it reads the files when it starts
			}
			// Not through the runtime socket: HAProxy 2.6 crashes when a certificate
			// and a CA file are both replaced there. Sessions stay with the old worker.
			return n.reloadHAProxy(ctx)
		}),
		// Patroni's API reads the CAs again with a new certificate only.
		once("Patroni", func() error {
			return n.reissue(ctx, w, map[pki.Role]string{pki.RolePatroni: "the trusted CAs have changed"})
		}),
	)
	if err != nil {
		return "its parts are loading the CA certificates", err
	}
	if !n.patroniServes(ctx) {
		return "its Patroni has not loaded the CA certificates yet", nil
	}
	return "", nil
}

// patroniServes says whether Patroni's API, if it runs, shows the certificate
// that is on disk.
func (n *Node) patroniServes(ctx context.Context) bool {
	if n.patroni.Status().State != supervisor.Running {
		return true // it reads the files when it starts
	}
	b, err := n.pki.Bundle(pki.RolePatroni)
	if err != nil {
		return false
	}
	conn, err := n.certs.DialTLS(askTimeout, nil)(ctx, "tcp", hostPort(n.cfg.Address, n.cfg.Ports.Patroni))
	if err != nil {
		return false
	}
	defer func() { _ = conn.Close() }()
	t, ok := conn.(*tls.Conn)
	return ok && t.ConnectionState().PeerCertificates[0].Equal(b.Leaf)
}

// patroniTakes says what it waits for until Patroni accepts the present password.
func (n *Node) patroniTakes(ctx context.Context, w world) (string, error) {
	if n.patroni.Status().State != supervisor.Running {
		return "", nil // its configuration is written before it starts
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	url := "https://" + hostPort(n.cfg.Address, n.cfg.Ports.Patroni)
	err := patroni.NewClient(url, n.certs.ClientConfig(nil), cluster.PatroniRESTUser, w.Secrets.PatroniREST).CheckPassword(ctx)
	var status *patroni.StatusError
	switch {
	case err == nil:
		return "", nil
	case errors.As(err, &status) && status.Code == http.StatusUnauthorized:
		// A reload that came too early is asked for again.
		return "its Patroni has not taken the new password yet", signalRunning(n.patroni, syscall.SIGHUP)
	}
	return "its Patroni does not answer", nil
}

// forgetPasswords drops the former passwords once every data node has taken the
// present ones. Any of them may do that.
func (n *Node) forgetPasswords(ctx context.Context, w world) error {
	if w.Secrets == nil || len(w.Secrets.FormerPasswords()) == 0 || !w.Viewed {
		return nil
	}
	for _, m := range w.Members {
		if m.Role == cluster.RoleData && w.Taken[m.Name].Secrets != w.Secrets.Generation {
			return nil
		}
	}
	store := n.store.Load()
	if store == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	old, err := store.SealedSecrets(ctx)
	if err != nil {
		return err
	}
	s, err := cluster.OpenSecrets(*n.sealing, n.state.ClusterID, old)
	if err != nil {
		return err
	}
	if s.Generation != w.Secrets.Generation {
		return nil // there is a newer rotation
	}
	next, err := cluster.SealSecrets(*n.sealing, n.state.ClusterID, s.Forget())
	if err != nil {
		return err
	}
	err = store.ReplaceSecrets(ctx, old, next)
	if errors.Is(err, cluster.ErrConflict) {
		return nil // another node has done it
	}
	if err == nil {
		n.event(EventSecrets, "", actorPgha, "every data node uses the new passwords; the former ones are forgotten")
	}
	return err
}

// missing names the members that have not taken something, each with the reason.
func (n *Node) missing(members []cluster.Member, taken map[string]cluster.Taken, has func(cluster.Taken) bool) (silent, waiting []string) {
	lately := n.seen.lately()
	for _, m := range members {
		if has(taken[m.Name]) {
			continue
		}
		r, answers := lately[m.Name]
		if m.Name == n.cfg.Name {
			n.mu.Lock()
			r.Unconfirmed, answers = n.rotation.why, true
			n.mu.Unlock()
		}
		switch {
		case !answers:
			silent = append(silent, m.Name)
		case r.Unconfirmed == "":
			waiting = append(waiting, m.Name)
		default:
			waiting = append(waiting, m.Name+" ("+r.Unconfirmed+")")
		}
	}
	slices.Sort(silent)
	slices.Sort(waiting)
	return silent, waiting
}

// blocked puts in words for what a rotation waits.
func blocked(silent, waiting []string) string {
	var parts []string
	if len(silent) > 0 {
		does := "does"
		if len(silent) > 1 {
			does = "do"
		}
		parts = append(parts, strings.Join(silent, " and ")+" "+does+" not answer")
	}
	if len(waiting) > 0 {
		parts = append(parts, "waiting for "+strings.Join(waiting, ", "))
	}
	return strings.Join(parts, "; ")
}

// awaitTaken tells, name by name, who has taken something, until all members
// have, or, if it is enough, all that answer. It returns who is silent.
func (n *Node) awaitTaken(ctx context.Context, o *Operation, what string, members func(cluster.Member) bool, has func(cluster.Taken) bool, reachable bool) (silent []string, err error) {
	done, said := map[string]bool{}, ""
	seen, since := "", time.Time{} // what it waits for, and since when
	for {
		silent, waiting := []string(nil), []string{"etcd"}
		if store := n.store.Load(); store != nil {
			try, cancel := context.WithTimeout(ctx, 3*time.Second)
			roster, _, err := store.Members(try)
			var taken map[string]cluster.Taken
			if err == nil {
				taken, err = store.TakenBy(try)
			}
			cancel()
			if err == nil {
				roster = slices.DeleteFunc(roster, func(m cluster.Member) bool { return !members(m) })
				for _, m := range roster {
					if has(taken[m.Name]) && !done[m.Name] {
						done[m.Name] = true
						o.Say("%s: %s", m.Name, what)
					}
				}
				silent, waiting = n.missing(roster, taken, has)
			}
		}
		if len(waiting) == 0 && (len(silent) == 0 || reachable) {
			return silent, nil
		}
		if text := blocked(silent, waiting); text != seen {
			seen, since = text, time.Now()
		}
		if seen != said && time.Since(since) > 2*time.Second { // not every passing moment
			said = seen
			o.Say("%s", said)
		}
		if !sleep(ctx, 300*time.Millisecond) {
			return silent, &notTaken{why: seen}
		}
	}
}

// notTaken says that time ran out before every member had followed.
type notTaken struct{ why string }

// Error implements error.
func (e *notTaken) Error() string { return e.why }

// refusal is the error that an operation ends with: an operator who has ended it
// himself need not be told why it took so long.
func (e *notTaken) refusal(ctx context.Context, rest string) error {
	if errors.Is(context.Cause(ctx), errInterrupted) {
		return errInterrupted
	}
	return &cluster.Error{Code: cluster.CodeUnavailable, Message: e.why + ": " + rest}
}
