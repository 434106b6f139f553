package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"pgha/cluster"
	"pgha/internal/fsx"
	"pgha/patroni"
	"pgha/pki"
	"pgha/supervisor"
)

// PrepareInit writes everything that the founder of a new cluster needs to
// start. It may be repeated after an interruption: nothing of an unfinished
// init is of any use, so it is made anew.
func PrepareInit(p Paths, cfg Config, settings cluster.Settings, sans []string, adopt string) (State, error) {
	now := time.Now().UTC()
	id, err := cluster.NewIdentity(cfg.Cluster, now)
	if err != nil {
		return State{}, err
	}
	s := State{
		ClusterID: id.ID, ClusterName: id.Name, Node: cfg.Name, Role: cluster.RoleData, Phase: PhasePreparing,
		CreatedAt: id.CreatedAt, Founder: true, Settings: &settings, SANs: sans,
		InitialCluster: map[string]string{cfg.Name: peerURL(cfg.Address, cfg.Ports)},
	}
	if err := settings.Validate(); err != nil {
		return s, err
	}
	if err := selfMember(cfg, s).Validate(); err != nil {
		return s, err
	}
	if adopt != "" {
		info, err := CheckAdoptable(adopt)
		if err != nil {
			return s, err
		}
		s.Adopted, s.SystemID = adopt, info.SystemID
		conf, err := adoptedConf(info, adopt)
		if err != nil {
			return s, err
		}
		settings.Postgres = carriedSettings(conf)
	}
	own, err := lookupOwners(cluster.RoleData)
	if err != nil {
		return s, err
	}
	if err := startPreparing(p, s, cfg); err != nil {
		return s, err
	}
	if err := writeFounderKeys(p, pkiDir(p, own), cfg, s, settings, now); err != nil {
		return s, err
	}
	if adopt != "" {
		if err := adoptDataDir(cfg.Postgres.BinDir, adopt, own.postgres); err != nil {
			return s, err
		}
	}
	s.Phase = PhaseReady
	return s, s.Save(p)
}

// startPreparing writes the state first: whatever is found of this node later
// is then known to belong to an unfinished attempt.
func startPreparing(p Paths, s State, cfg Config) error {
	if err := makeDirs(p); err != nil {
		return err
	}
	if err := s.Save(p); err != nil {
		return err
	}
	return cfg.Save(p.Config())
}

func writeFounderKeys(p Paths, dir pki.Dir, cfg Config, s State, settings cluster.Settings, now time.Time) error {
	key, err := cluster.NewSealingKey()
	if err != nil {
		return err
	}
	if err := key.Save(p.sealingKey()); err != nil {
		return err
	}
	ca, err := pki.NewCA(s.ClusterID, s.ClusterName, now)
	if err != nil {
		return err
	}
	caKey, err := ca.KeyPEM()
	if err != nil {
		return err
	}
	sealedCA, err := cluster.SealCAKey(key, s.ClusterID, caKey)
	if err != nil {
		return err
	}
	secrets, err := cluster.NewSecrets()
	if err != nil {
		return err
	}
	sealed, err := cluster.SealSecrets(key, s.ClusterID, secrets)
	if err != nil {
		return err
	}
	if err := errors.Join(dir.WriteCA(ca.CertPEM()), writeSecret(p.sealedCAKey(), sealedCA), writeSecret(p.secrets(), sealed)); err != nil {
		return err
	}
	self := selfMember(cfg, s)
	id := cluster.Identity{ID: s.ClusterID, Name: s.ClusterName, CreatedAt: s.CreatedAt}
	for role, spec := range cluster.LeafSpecs(id, self, []cluster.Member{self}, settings) {
		keyPEM, csr, err := pki.NewKeyAndCSR(spec.CommonName)
		if err != nil {
			return err
		}
		cert, err := ca.Sign(csr, spec, now)
		if err != nil {
			return fmt.Errorf("sign certificate %s: %w", role, err)
		}
		if err := dir.WriteBundle(role, pki.Bundle{KeyPEM: keyPEM, CertPEM: cert, CAPEM: ca.CertPEM()}); err != nil {
			return fmt.Errorf("write certificate %s: %w", role, err)
		}
	}
	return nil
}

func writeSecret(path string, data []byte) error {
	return fsx.WriteFile(path, data, 0o600, fsx.Keep, fsx.Keep)
}

// SetConfig replaces the configuration, once the host is prepared.
func (j *Joining) SetConfig(cfg Config) { j.cfg = cfg }

// Joining is a join on its way: what build has prepared, so that the answer
// can be written.
type Joining struct {
	paths Paths
	cfg   Config
	state State
	keys  map[pki.Role][]byte
	major int // of the cluster's PostgreSQL, once Check has been told; 0 = not known
}

// PGMajor returns the major version of the cluster's PostgreSQL, which Check
// has learned; 0 if it is not known.
func (j *Joining) PGMajor() int { return j.major }

// NewJoining prepares a join. The keys are written before the request is sent
// and read again by a repetition: the cluster knows an interrupted join by them.
func NewJoining(p Paths, cfg Config, tok cluster.Token, sans []string) *Joining {
	return &Joining{paths: p, cfg: cfg, keys: map[pki.Role][]byte{}, state: State{
		ClusterID: tok.ClusterID, ClusterName: cfg.Cluster, Node: cfg.Name, Role: cfg.Role, Phase: PhasePreparing,
		CreatedAt: time.Now().UTC(), TokenID: tok.ID, SANs: sans,
	}}
}

// Check returns the request that asks whether the cluster would take this node
// in. It writes nothing. The cluster's PostgreSQL is taken for this node's
// where none is installed yet.
func (j *Joining) Check(h cluster.Hello) (cluster.JoinRequest, error) {
	req := j.request()
	if j.cfg.Role == cluster.RoleData {
		j.major = h.PGMajor
		if req.PGMajor == 0 {
			req.PGMajor = h.PGMajor
		}
	}
	return req, j.loadKeys(&req)
}

// Request writes the node's keys and returns the request to send.
func (j *Joining) Request() (cluster.JoinRequest, error) {
	req := j.request()
	if err := startPreparing(j.paths, j.state, j.cfg); err != nil {
		return req, err
	}
	if err := j.loadKeys(&req); err != nil {
		return req, err
	}
	for role, key := range j.keys {
		if err := writeSecret(j.keyPath(role), key); err != nil {
			return req, fmt.Errorf("write key %s: %w", role, err)
		}
	}
	return req, nil
}

func (j *Joining) request() cluster.JoinRequest {
	req := cluster.JoinRequest{
		Name: j.cfg.Name, Role: j.cfg.Role, Addr: j.cfg.Address, Ports: j.cfg.Ports, SANs: j.state.SANs,
		CSRs: map[pki.Role][]byte{}, Version: Version,
	}
	if j.cfg.Role == cluster.RoleData {
		req.PGMajor = majorOf(j.cfg.Postgres.BinDir)
	}
	return req
}

// loadKeys fills the request's CSRs: with the keys of an earlier attempt where
// there are any, with new ones otherwise.
func (j *Joining) loadKeys(req *cluster.JoinRequest) error {
	for _, role := range j.cfg.Role.Roles() {
		if j.keys[role] == nil {
			key, err := os.ReadFile(j.keyPath(role))
			if errors.Is(err, fs.ErrNotExist) {
				key, _, err = pki.NewKeyAndCSR(j.cfg.Name)
			}
			if err != nil {
				return fmt.Errorf("make key %s: %w", role, err)
			}
			j.keys[role] = key
		}
		csr, err := pki.CSRFor(j.keys[role], j.cfg.Name)
		if err != nil {
			return fmt.Errorf("make certificate request %s: %w", role, err)
		}
		req.CSRs[role] = csr
	}
	return nil
}

func (j *Joining) keyPath(r pki.Role) string {
	return filepath.Join(j.paths.PKI(), "joining-"+string(r)+".key")
}

// Finish writes the cluster's answer; from then on this host is a node.
func (j *Joining) Finish(resp cluster.JoinResponse) (State, error) {
	s := j.state
	s.ClusterName, s.CreatedAt, s.InitialCluster = resp.Name, time.Now().UTC(), resp.InitialCluster
	j.cfg.Cluster = resp.Name
	own, err := lookupOwners(j.cfg.Role)
	if err != nil {
		return s, err
	}
	dir := pkiDir(j.paths, own)
	ca, err := pki.Signer(resp.CAPEM)
	if err != nil {
		return s, err
	}
	errs := []error{dir.WriteCA(resp.CAPEM), j.cfg.Save(j.paths.Config())}
	for role, key := range j.keys {
		errs = append(errs, dir.WriteBundle(role, pki.Bundle{KeyPEM: key, CertPEM: resp.Certs[role], CAPEM: ca}))
	}
	errs = append(errs, fsx.WriteJSON(j.paths.roster(), cache{Members: resp.Members, Settings: resp.Settings}, 0o600))
	if err := errors.Join(errs...); err != nil {
		return s, err
	}
	if j.cfg.Role == cluster.RoleData {
		if err := j.finishData(resp); err != nil {
			return s, err
		}
	}
	for role := range j.keys {
		if err := os.Remove(j.keyPath(role)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return s, fmt.Errorf("remove temporary key: %w", err)
		}
	}
	s.Phase = PhaseReady
	return s, s.Save(j.paths)
}

func (j *Joining) finishData(resp cluster.JoinResponse) error {
	key, err := cluster.SealingKeyFrom(resp.ClusterKey)
	if err != nil {
		return err
	}
	if resp.Secrets == nil {
		return errors.New("the cluster's answer holds no secrets for a data node")
	}
	sealed, err := cluster.SealSecrets(key, resp.ID, *resp.Secrets)
	if err != nil {
		return err
	}
	return errors.Join(key.Save(j.paths.sealingKey()), writeSecret(j.paths.sealedCAKey(), resp.SealedCAKey), writeSecret(j.paths.secrets(), sealed))
}

// Undo removes what Request has written after the cluster refused the join:
// the host is as it was.
func (j *Joining) Undo() error {
	return RemovePrepared(j.paths)
}

// RemovePrepared removes the files of an init or join that has not finished.
func RemovePrepared(p Paths) error {
	s, err := LoadState(p)
	if errors.Is(err, ErrNoNode) {
		return nil
	}
	if err != nil {
		return err
	}
	if s.Phase != PhasePreparing {
		return errors.New("remove prepared files: this host is a node already")
	}
	var errs []error
	for _, path := range []string{p.PKI(), p.etcd(), p.roster(), p.secrets(), p.Config(), p.State()} {
		errs = append(errs, os.RemoveAll(path))
	}
	return errors.Join(errs...)
}

// adoptDataDir makes a data directory that Debian's tools made fit for
// Patroni: it is PostgreSQL's own, and its settings stand inside.
func adoptDataDir(binDir, dir string, owner *supervisor.User) error {
	uid, gid := int(owner.UID), int(owner.GID)
	info, err := patroni.InspectDataDir(dir)
	if err != nil {
		return err
	}
	if info.UID != uid {
		return fmt.Errorf("%s belongs to uid %d, PostgreSQL runs as uid %d: chown -R it first", dir, info.UID, uid)
	}
	if !info.Config {
		text, err := adoptedSettings(info.Major, dir)
		if err != nil {
			return err
		}
		if err := fsx.WriteFile(filepath.Join(dir, "postgresql.conf"), text, 0o600, uid, gid); err != nil {
			return err
		}
	}
	return adoptRoles(binDir, dir, owner)
}
