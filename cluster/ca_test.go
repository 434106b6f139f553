package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"pgha/pki"
)

func TestCAStateSteps(t *testing.T) {
	one := CAState{Phase: CADone, Certs: [][]byte{[]byte("old")}, Keys: [][]byte{[]byte("k old")}}
	start := func(s CAState) (CAState, error) { return s.Start([]byte("new"), []byte("k new")) }
	for _, tc := range []struct {
		name  string
		steps []func(CAState) (CAState, error)
		phase CAPhase // "" = the last step is refused
		certs string

		signed bool
	}{
		{"start", []func(CAState) (CAState, error){start}, CATrust, "old new", false},
		{"sign", []func(CAState) (CAState, error){start, CAState.Sign}, CASign, "new old", true},
		{"finish", []func(CAState) (CAState, error){start, CAState.Sign, CAState.Drop}, CADone, "new", false},
		{"back from signing", []func(CAState) (CAState, error){start, CAState.Sign, CAState.Back}, CATrust, "old new", true},
		{"given up", []func(CAState) (CAState, error){start, CAState.Drop}, CADone, "old", false},
		{"back and given up", []func(CAState) (CAState, error){start, CAState.Sign, CAState.Back, CAState.Drop}, CADone, "old", false},
		{"started once more", []func(CAState) (CAState, error){start, CAState.Sign, CAState.Back, CAState.Drop, start}, CATrust, "old new", false},
		{"start twice", []func(CAState) (CAState, error){start, start}, "", "", false},
		{"sign at once", []func(CAState) (CAState, error){CAState.Sign}, "", "", false},
		{"sign twice", []func(CAState) (CAState, error){start, CAState.Sign, CAState.Sign}, "", "", false},
		{"back from the start", []func(CAState) (CAState, error){start, CAState.Back}, "", "", false},
		{"drop the only one", []func(CAState) (CAState, error){CAState.Drop}, "", "", false},
	} {
		s := one
		var before CAState
		var err error
		for _, step := range tc.steps {
			before = s
			if s, err = step(s); err != nil {
				break
			}
			if s.Step != before.Step+1 {
				t.Errorf("%s: step %d after %d", tc.name, s.Step, before.Step)
			}
		}
		if tc.phase == "" {
			if err == nil {
				t.Errorf("%s: not refused", tc.name)
			}
			continue
		}
		words := func(of [][]byte) string { return string(bytes.Join(of, []byte(" "))) }
		if err != nil || s.Phase != tc.phase || words(s.Certs) != tc.certs || strings.ReplaceAll(words(s.Keys), "k ", "") != tc.certs {
			t.Errorf("%s: %v, phase %s, certificates %q, keys %q", tc.name, err, s.Phase, words(s.Certs), words(s.Keys))
		}
		if s.Signed != tc.signed {
			t.Errorf("%s: that the next CA has signed is %v, want %v", tc.name, s.Signed, tc.signed)
		}
	}
	if words := string(one.Certs[0]) + string(one.Keys[0]); words != "oldk old" || one.Step != 0 {
		t.Errorf("a step has changed the state before it: %+v", one)
	}
}

func TestCAStateInTheStore(t *testing.T) {
	f, ctx := newFixture(t), testContext(t)
	if s, rev, err := f.store.CAState(ctx, &f.key); s != nil || rev != 0 || err != nil {
		t.Fatalf("a CA that was never replaced: %v %d %v", s, rev, err)
	}
	next := must[*pki.CA](t)(pki.NewCA(f.id.ID, "x", time.Now()))
	sealedKey := must[[]byte](t)(SealCAKey(f.key, f.id.ID, must[[]byte](t)(next.KeyPEM())))
	first := CAState{Phase: CADone, Certs: [][]byte{f.ca.CertPEM()}, Keys: [][]byte{[]byte("sealed old")}}
	s := must[CAState](t)(first.Start(next.CertPEM(), sealedKey))
	s = must[CAState](t)(s.Sign())
	s.By, s.At = "root@n1", time.Now()
	if err := f.store.PutCAState(ctx, f.key, s, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.store.PutCAState(ctx, f.key, s, 0); !errors.Is(err, ErrConflict) {
		t.Errorf("written over what was not read: %v", err)
	}
	if got := must[[]byte](t)(f.store.SealedCAKey(ctx)); !bytes.Equal(got, sealedKey) {
		t.Error("joins would not find the key that signs")
	}
	for who, key := range map[string]*SealingKey{"a data node": &f.key, "a witness": nil} {
		got, rev, err := f.store.CAState(ctx, key)
		if err != nil || rev == 0 || got.Phase != CASign || got.Step != 2 || !bytes.Equal(got.Trust(), pki.TrustFile(next.CertPEM(), f.ca.CertPEM())) {
			t.Errorf("%s reads %+v, %v", who, got, err)
		}
	}

	// A witness can write what it likes: data nodes do not follow it.
	evil := must[*pki.CA](t)(pki.NewCA(f.id.ID, "x", time.Now()))
	forged := s
	forged.Step, forged.Certs = 3, [][]byte{next.CertPEM(), evil.CertPEM()}
	own := must[SealingKey](t)(NewSealingKey())
	_, rev, err := f.store.CAState(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.store.PutCAState(ctx, own, forged, rev); err != nil {
		t.Fatal(err)
	}
	if got, _, err := f.store.CAState(ctx, &f.key); !errors.Is(err, ErrSealed) {
		t.Errorf("a state sealed with another key is followed: %+v, %v", got, err)
	}
	plain := must[[]byte](t)(json.Marshal(forged))
	value := must[[]byte](t)(json.Marshal(storedCA{State: plain, Sealed: must[[]byte](t)(Seal(f.key, f.id.ID, keyCA, must[[]byte](t)(json.Marshal(s))))}))
	if _, err := f.store.c.Put(ctx, f.store.key(keyCA), string(value)); err != nil {
		t.Fatal(err)
	}
	if got, _, err := f.store.CAState(ctx, &f.key); err != nil || got.Step != 2 {
		t.Errorf("a data node goes by what is not sealed: %+v, %v", got, err)
	}

	// Nonsense is refused, read or written.
	foreign := must[*pki.CA](t)(pki.NewCA("11111111-2222-4333-8444-555555555555", "x", time.Now()))
	for name, bad := range map[string]CAState{
		"no phase":                {Certs: first.Certs, Keys: first.Keys},
		"one in phase sign":       {Phase: CASign, Certs: first.Certs, Keys: first.Keys},
		"a key short":             {Phase: CASign, Certs: s.Certs, Keys: first.Keys},
		"no certificate":          {Phase: CADone, Certs: [][]byte{[]byte("x")}, Keys: first.Keys},
		"another cluster's alone": {Phase: CADone, Certs: [][]byte{foreign.CertPEM()}, Keys: first.Keys},
	} {
		if err := f.store.PutCAState(ctx, f.key, bad, rev); err == nil || errors.Is(err, ErrConflict) {
			t.Errorf("%s is written: %v", name, err)
		}
	}
}

func TestTaken(t *testing.T) {
	f, ctx := newFixture(t), testContext(t)
	if err := f.store.PutTaken(ctx, "n1", Taken{CA: 2, Secrets: 1}); err != nil {
		t.Fatal(err)
	}
	if err := f.store.PutTaken(ctx, "n1", Taken{CA: 3, Secrets: 1}); err != nil {
		t.Fatal(err)
	}
	got := must[map[string]Taken](t)(f.store.TakenBy(ctx))
	if len(got) != 1 || got["n1"] != (Taken{CA: 3, Secrets: 1}) {
		t.Errorf("read %v", got)
	}
}

func TestSecretsRotate(t *testing.T) {
	s := must[Secrets](t)(NewSecrets())
	seen := []string{s.PatroniREST}
	for i := range formerPasswords + 2 {
		next := must[Secrets](t)(s.Rotate())
		if next.Generation != int64(i+1) || next.PatroniREST == s.PatroniREST || next.StatsPage == s.StatsPage {
			t.Fatalf("rotation %d: generation %d, or a password stayed", i, next.Generation)
		}
		seen = append([]string{next.PatroniREST}, seen...)
		if want := seen[1:min(len(seen), formerPasswords+1)]; !slices.Equal(next.FormerPasswords(), want) {
			t.Errorf("rotation %d: %d former passwords, want %d, the newest first", i, len(next.FormerPasswords()), len(want))
		}
		s = next
	}
	f, ctx := newFixture(t), testContext(t)
	old := must[[]byte](t)(f.store.SealedSecrets(ctx))
	sealed := must[[]byte](t)(SealSecrets(f.key, f.id.ID, s))
	if err := f.store.ReplaceSecrets(ctx, old, sealed); err != nil {
		t.Fatal(err)
	}
	if err := f.store.ReplaceSecrets(ctx, old, old[:1]); err != nil && !errors.Is(err, ErrConflict) || err == nil {
		t.Errorf("replaced what was not there any more: %v", err)
	}
	if got := must[Secrets](t)(OpenSecrets(f.key, f.id.ID, must[[]byte](t)(f.store.SealedSecrets(ctx)))); got != s {
		t.Error("the secrets came back changed")
	}
	if f := s.Forget(); len(f.FormerPasswords()) != 0 || f.PatroniREST != s.PatroniREST || f.Generation != s.Generation {
		t.Error("Forget does more, or less, than to forget")
	}
}
