package patroni

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
)

// TestFormerPasswords asks members that accept one password, as Patroni does.
func TestFormerPasswords(t *testing.T) {
	for _, tc := range []struct {
		name    string
		accepts string
		tried   []string
		ok      bool
	}{
		{"the present one", "new", []string{"new"}, true},
		{"the last before", "old", []string{"new", "old"}, true},
		{"one before that", "older", []string{"new", "old", "older"}, true},
		{"none of them", "x", []string{"new", "old", "older"}, false},
	} {
		var tried, bodies []string
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, pass, _ := r.BasicAuth()
			body, _ := io.ReadAll(r.Body)
			tried, bodies = append(tried, pass), append(bodies, string(body))
			if pass != tc.accepts {
				w.WriteHeader(http.StatusUnauthorized)
			}
		}))
		c := NewClient(srv.URL, nil, "patroni", "new", "old", "older")
		err := c.PatchConfig(t.Context(), map[string]any{"a": 1})
		srv.Close()
		if (err == nil) != tc.ok || !slices.Equal(tried, tc.tried) {
			t.Errorf("%s: %v, tried %v, want %v", tc.name, err, tried, tc.tried)
		}
		for _, b := range bodies {
			if b != `{"a":1}` {
				t.Errorf("%s: the body of a repetition is %q", tc.name, b)
			}
		}
	}
}

func TestCheckPassword(t *testing.T) {
	for code, want := range map[int]int{http.StatusBadRequest: 0, http.StatusUnauthorized: http.StatusUnauthorized, http.StatusServiceUnavailable: http.StatusServiceUnavailable, http.StatusOK: -1} {
		a, c := newAPI(t)
		a.code = code
		err := c.CheckPassword(t.Context())
		var status *StatusError
		got := 0
		if errors.As(err, &status) {
			got = status.Code
		} else if err != nil {
			got = -1
		}
		if got != want || a.method != http.MethodPatch || a.got != "{}" || a.pass != labPass {
			t.Errorf("answer %d: %v, after %s %s", code, err, a.method, a.got)
		}
	}
}
