package cluster

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"

	"pgha/pki"
)

// maxBody bounds a request, in bytes: a join with five certificate requests
// takes about 5 KiB.
const maxBody = 256 << 10

// Handler serves [PathHello], [PathJoin] and [PathRenew]. The listener's TLS
// must verify client certificates when they are given and let joiners in
// without one (tls.VerifyClientCertIfGiven).
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+PathHello, func(w http.ResponseWriter, _ *http.Request) {
		body, err := json.Marshal(s.Hello())
		s.answer(w, body, err)
	})
	mux.HandleFunc("POST "+PathJoin, s.handleJoin)
	mux.HandleFunc("POST "+PathRenew, s.handleRenew)
	return mux
}

func (s *Server) handleJoin(w http.ResponseWriter, r *http.Request) {
	// A peer address that does not parse shares one limit with its like.
	peer, _ := netip.ParseAddrPort(r.RemoteAddr)
	var req JoinRequest
	var body []byte
	err := decodeBody(w, r, &req)
	if err == nil {
		var resp JoinResponse
		if resp, err = s.Join(r.Context(), peer.Addr().Unmap(), req); err == nil {
			body, err = resp.wireJSON()
		}
	}
	if err != nil {
		s.refused(w, r, err, req.Name)
		return
	}
	if req.DryRun {
		s.answer(w, body, nil)
		return
	}
	s.log().Info("took a node in", "node", req.Name, "role", string(req.Role), "addr", req.Addr, "token", req.TokenID, "remote", r.RemoteAddr)
	s.answer(w, body, nil)
}

func (s *Server) handleRenew(w http.ResponseWriter, r *http.Request) {
	var id pki.Identity
	err := pki.ErrNoIdentity
	if r.TLS != nil {
		id, err = pki.PeerIdentity(*r.TLS)
	}
	if err != nil {
		s.refused(w, r, refuse(CodeNoMember, "a renewal needs the node's own certificate: %s", err), "")
		return
	}
	var req RenewRequest
	var body []byte
	if err = decodeBody(w, r, &req); err == nil {
		var resp RenewResponse
		if resp, err = s.Renew(r.Context(), id, req); err == nil {
			body, err = json.Marshal(resp)
		}
	}
	if err != nil {
		s.refused(w, r, err, id.Node)
		return
	}
	s.log().Info("renewed certificates", "node", id.Node, "count", len(req.CSRs))
	s.answer(w, body, nil)
}

func decodeBody(w http.ResponseWriter, r *http.Request, v any) error {
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(v); err != nil {
		// The decoder's error may quote the body: it goes nowhere.
		return refuse(CodeBadRequest, "the request is not the JSON that this version of pgha understands")
	}
	return nil
}

func (s *Server) answer(w http.ResponseWriter, body []byte, err error) {
	if err != nil {
		s.log().Error("cannot encode an answer", "error", err)
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	writeJSON(w, http.StatusOK, body)
}

// refused answers with the error and logs it: this is where both ends of it are.
func (s *Server) refused(w http.ResponseWriter, r *http.Request, err error, node string) {
	var e *Error
	if !errors.As(err, &e) {
		e = refuse(CodeUnavailable, "%s cannot do this now: %s", s.Node, oneLine(err)).because(err)
	}
	attrs := []any{"path", r.URL.Path, "node", node, "remote", r.RemoteAddr, "code", string(e.Code), "reason", e.Message}
	if e.cause != nil {
		attrs = append(attrs, "cause", e.cause)
	}
	s.log().Warn("refused a request", attrs...)
	body, merr := json.Marshal(e)
	if merr != nil {
		s.answer(w, nil, merr)
		return
	}
	writeJSON(w, e.Code.status(), body)
}

func writeJSON(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	// A reader that has gone away asks again; there is nobody to tell.
	_, _ = w.Write(append(body, '\n'))
}
