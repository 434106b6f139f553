package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"pgha/cluster"
)

// PasswordsRotated is the outcome of pgha rotate passwords.
type PasswordsRotated struct {
	Generation int64 `json:"generation"`
	// Silent are the data nodes that did not answer. They take the passwords when
	// they return; until then the former ones stay known.
	Silent []string `json:"silent,omitempty"`
}

// rotatePasswords gives Patroni's API and the status page new passwords. The
// roles that pgha uses in PostgreSQL have none (docs/adr/0006).
func (n *Node) rotatePasswords(ctx context.Context, o *Operation, body json.RawMessage) (any, error) {
	if err := decodeRequest(body, &struct{}{}); err != nil {
		return nil, err
	}
	store := n.store.Load()
	if store == nil {
		return nil, n.notReady()
	}
	var next cluster.Secrets
	err := func() error {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		old, err := store.SealedSecrets(ctx)
		if err != nil {
			return err
		}
		secrets, err := cluster.OpenSecrets(*n.sealing, n.state.ClusterID, old)
		if err != nil {
			return err
		}
		if secrets.Former[len(secrets.Former)-1] != "" {
			return &cluster.Error{Code: cluster.CodeConflict, Message: fmt.Sprintf("a node has not taken the passwords of the last %d rotations: start it, or take it out of the cluster, and repeat", len(secrets.Former))}
		}
		if next, err = secrets.Rotate(); err != nil {
			return err
		}
		sealed, err := cluster.SealSecrets(*n.sealing, n.state.ClusterID, next)
		if err != nil {
			return err
		}
		return store.ReplaceSecrets(ctx, old, sealed)
	}()
	if err != nil {
		return nil, err
	}
	o.Leaves("the new passwords are in force; nodes that have not taken them do so by themselves, and until then the former ones are tried too")
	o.Say("new passwords for Patroni's API and the status page are sealed in the cluster")
	n.event(EventSecrets, "", o.Actor(), "new passwords for Patroni's API and the status page (generation %d)", next.Generation)
	n.wake()
	silent, err := n.awaitTaken(ctx, o, "Patroni and HAProxy use the new passwords",
		func(m cluster.Member) bool { return m.Role == cluster.RoleData },
		func(t cluster.Taken) bool { return t.Secrets >= next.Generation }, true)
	var late *notTaken
	if errors.As(err, &late) {
		return nil, late.refusal(ctx, "the new passwords are in force, and are taken by themselves when that is over")
	}
	if err != nil {
		return nil, err
	}
	if len(silent) > 0 {
		o.Say("%s did not answer: it takes the new passwords when it returns; until then the former ones stay known", strings.Join(silent, " and "))
		return PasswordsRotated{Generation: next.Generation, Silent: silent}, nil
	}
	o.Say("the former passwords are forgotten")
	return PasswordsRotated{Generation: next.Generation}, nil
}
