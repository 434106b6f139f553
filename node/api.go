package node

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"pgha/cluster"
	"pgha/pki"
)

const (
	apiBody        = 1 << 20 // bytes of a request that are read
	apiIdle        = time.Minute
	apiHeader      = 5 * time.Second
	apiShutdown    = 2 * time.Second
	apiReadTimeout = 30 * time.Second
)

// serveLocal answers the command line on the unix socket. Who may open the
// socket, root alone, may do everything.
func (n *Node) serveLocal(ctx context.Context) error {
	path := n.paths.Socket()
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove old socket: %w", err)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return fmt.Errorf("set mode of socket: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) { reply(w, n.status(r.Context()), nil) })
	mux.HandleFunc("GET /v1/node", func(w http.ResponseWriter, r *http.Request) { reply(w, n.report(r.Context()), nil) })
	mux.HandleFunc("GET /v1/config", n.configHandler)
	mux.HandleFunc("GET /v1/config/history", n.configHistoryHandler)
	mux.HandleFunc("GET /v1/config/document", n.configDocumentHandler)
	mux.HandleFunc("POST /v1/config/plan", n.configPlanHandler)
	mux.HandleFunc("POST /v1/failover", n.failoverPlanHandler)
	mux.HandleFunc("POST /v1/recovery", n.planHandler)
	mux.HandleFunc("POST /v1/snapshots", n.snapshotHandler)
	mux.HandleFunc("GET /v1/tokens", n.listTokens)
	mux.HandleFunc("POST /v1/tokens", n.createToken)
	mux.HandleFunc("DELETE /v1/tokens/{id}", n.revokeToken)
	mux.HandleFunc("GET /v1/members", n.memberListHandler)
	mux.HandleFunc("POST /v1/certificates", n.renewHandler)
	mux.HandleFunc("GET /v1/certificates", n.certsHandler)
	mux.HandleFunc("POST /v1/operations/{kind}", n.operationHandler)
	mux.HandleFunc("DELETE /v1/operations/{id}", n.interruptHandler)
	mux.HandleFunc("GET /v1/events", n.eventsHandler)
	mux.HandleFunc("GET /v1/packages", n.packagesHandler)
	mux.HandleFunc("GET /v1/databases", n.databasesHandler)
	mux.HandleFunc("GET /v1/users", n.usersHandler)
	return serveHTTP(ctx, l, mux, n.opts.Log)
}

// serveRemote answers peers and joining nodes over TLS. A client without a
// certificate may join, and nothing else.
func (n *Node) serveRemote(ctx context.Context) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", net.JoinHostPort("", fmt.Sprint(n.cfg.Ports.API)))
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	mux := http.NewServeMux()
	joins := n.joinHandler()
	mux.Handle("POST "+cluster.PathJoin, joins)
	mux.Handle("GET "+cluster.PathHello, joins)
	mux.Handle("POST "+cluster.PathRenew, n.renewals(joins))
	mux.Handle("GET /v1/node", n.peersOnly(func(w http.ResponseWriter, r *http.Request) { reply(w, n.report(r.Context()), nil) }))
	mux.Handle("GET "+pathAlive, n.peersOnly(func(w http.ResponseWriter, _ *http.Request) { reply(w, struct{}{}, nil) }))
	mux.Handle("GET /v1/status", n.peersOnly(func(w http.ResponseWriter, r *http.Request) { reply(w, n.status(r.Context()), nil) }))
	mux.HandleFunc("POST "+pathMemberLeave, n.memberLeaveHandler)
	mux.HandleFunc("POST "+pathStanding, n.standingHandler)
	mux.Handle("POST "+pathRetire, n.dataPeersOnly(n.retireHandler))
	mux.Handle("GET "+pathTraces, n.peersOnly(n.tracesHandler))
	mux.HandleFunc("POST "+pathMeet, n.meetHandler)
	mux.Handle("POST /v1/gate/keep-off", n.peersOnly(n.keepOff))
	mux.Handle("POST "+pathRenewNow, n.dataPeersOnly(n.renewHandler))
	mux.Handle("PUT "+pathProgram, n.dataPeersOnly(n.programHandler))
	mux.Handle("POST "+pathProgramCheck, n.dataPeersOnly(n.programCheckHandler))
	mux.Handle("POST "+pathProgramTrial, n.dataPeersOnly(n.programTrialHandler))
	mux.Handle("GET "+pathSettingsState, n.dataPeersOnly(n.settingsStateHandler))
	mux.Handle("POST "+pathSettingsTry, n.dataPeersOnly(n.settingsTryHandler))
	mux.Handle("POST "+pathCheckpoint, n.dataPeersOnly(n.checkpointHandler))
	mux.Handle("POST "+pathTask+"{task}", n.dataPeersOnly(n.taskHandler))
	return serveHTTP(ctx, tls.NewListener(l, n.certs.ServerConfig(tls.VerifyClientCertIfGiven)), mux, n.opts.Log)
}

// joinHandler serves joins and renewals with the store of the running etcd
// member, of which there may be several in the daemon's life.
func (n *Node) joinHandler() http.Handler {
	var mu sync.Mutex
	var server *cluster.Server
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		store := n.store.Load()
		if store == nil {
			reply(w, nil, n.notReady())
			return
		}
		mu.Lock()
		if server == nil || server.Store != store {
			server = &cluster.Server{
				Store: store, Identity: n.identity(), Node: n.cfg.Name, Version: Version, PGMajor: n.pgMajor,
				Membership: n, Replace: n.replace, OnMember: n.admit, Log: n.opts.Log.With("component", "join"),
			}
			if n.sealing != nil {
				server.CA, server.Trust = n.ca, n.pki.Trust
				server.Key = func() (cluster.SealingKey, error) { return *n.sealing, nil }
			}
		}
		h := server.Handler()
		mu.Unlock()
		h.ServeHTTP(w, r)
	})
}

// peersOnly admits this cluster's node certificates whose node is on the roster.
func (n *Node) peersOnly(h http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := n.caller(r)
		if err == nil && !n.onRoster(id.Node) {
			err = noPeer(fmt.Errorf("node %q is not a member of this cluster", id.Node))
		}
		if err == nil {
			err = n.ofThisLife(r, id.Node)
		}
		if err != nil {
			reply(w, nil, err)
			return
		}
		h(w, r)
	})
}

// dataPeersOnly is peersOnly for what only data nodes have to do. The roster says
// who is one.
func (n *Node) dataPeersOnly(h http.HandlerFunc) http.Handler {
	return n.peersOnly(func(w http.ResponseWriter, r *http.Request) {
		id, err := n.caller(r)
		if err == nil && !slices.Contains(n.dataNodes(), id.Node) {
			err = &cluster.Error{Code: cluster.CodeNoMember, Message: fmt.Sprintf("only a data node may ask for this, and %s is none", id.Node)}
		}
		if err != nil {
			reply(w, nil, err)
			return
		}
		h(w, r)
	})
}

// caller tells which node of this cluster asks, by its certificate alone: it
// may be on the roster no more.
func (n *Node) caller(r *http.Request) (pki.Identity, error) {
	id, err := pki.PeerIdentity(*r.TLS)
	if err == nil {
		err = n.isPeer(id)
	}
	if err != nil {
		return pki.Identity{}, noPeer(err)
	}
	return id, nil
}

func noPeer(err error) error {
	return &cluster.Error{Code: cluster.CodeNoMember, Message: "this needs the certificate of a node of this cluster: " + err.Error()}
}

// onRoster tells whether the cluster has a node of that name. A node that has
// not read the roster yet believes the certificate.
func (n *Node) onRoster(name string) bool {
	members := n.snapshot().Members
	for _, m := range members {
		if m.Name == name {
			return true
		}
	}
	return len(members) == 0
}

func serveHTTP(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: apiHeader, ReadTimeout: apiReadTimeout, IdleTimeout: apiIdle,
		ErrorLog: slog.NewLogLogger(log.With("component", "api").Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), apiShutdown)
		defer cancel()
		if srv.Shutdown(end) != nil {
			_ = srv.Close() // whoever still talks has had its time
		}
	})
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

// decode reads a JSON request: of the command line strictly, so that no wish is
// ignored, of a peer without that, for a newer version may have more to say.
func decode(w http.ResponseWriter, r *http.Request, v any) error {
	return decodeAs(w, r, v, r.TLS == nil)
}

// decodeStrictly is decode for what must not be done by halves, of a peer too.
func decodeStrictly(w http.ResponseWriter, r *http.Request, v any) error {
	return decodeAs(w, r, v, true)
}

func decodeAs(w http.ResponseWriter, r *http.Request, v any, strictly bool) error {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, apiBody))
	if strictly {
		d.DisallowUnknownFields()
	}
	if err := d.Decode(v); err != nil {
		return &cluster.Error{Code: cluster.CodeBadRequest, Message: "the request cannot be read: " + err.Error()}
	}
	return nil
}

// reply writes v, or err in the form that callAPI understands.
func reply(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		var e *cluster.Error
		if !errors.As(err, &e) {
			e = &cluster.Error{Code: cluster.CodeUnavailable, Message: err.Error()}
		}
		w.WriteHeader(e.Code.HTTPStatus())
		v = e
	}
	_ = json.NewEncoder(w).Encode(v) // the client has gone; nobody to tell
}
