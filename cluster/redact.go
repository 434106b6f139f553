package cluster

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
)

// errSecretJSON keeps a value with secrets out of JSON logs and plain files:
// it fails loudly, where a redacted value would be found out at the next read.
var errSecretJSON = errors.New("a value that holds secrets is not encoded as JSON: seal it")

// Every type that holds a secret has the same three methods, by value: Format
// (which fmt prefers for every verb, unlike String), LogValue and MarshalJSON.

// Format prints what is not secret, whatever the verb.
func (t Token) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, t.String()) }

// String describes the token without its secret.
func (t Token) String() string {
	return fmt.Sprintf("token %s (%s, cluster %s)", t.ID, string(t.Role), t.ClusterID)
}

// LogValue keeps the secret out of logs.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }

// MarshalJSON always fails.
func (t Token) MarshalJSON() ([]byte, error) { return nil, errSecretJSON }

// Format prints what is not secret, whatever the verb.
func (r JoinRequest) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, r.String()) }

// String describes the request without the token's secret.
func (r JoinRequest) String() string {
	return fmt.Sprintf("join request of %s (%s, %s) with token %s", r.Name, string(r.Role), r.Addr, r.TokenID)
}

// LogValue keeps the secret out of logs.
func (r JoinRequest) LogValue() slog.Value { return slog.StringValue(r.String()) }

// MarshalJSON always fails; [Join] sends the request.
func (r JoinRequest) MarshalJSON() ([]byte, error) { return nil, errSecretJSON }

// Format prints what is not secret, whatever the verb.
func (r JoinResponse) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, r.String()) }

// String describes the response without its secrets.
func (r JoinResponse) String() string {
	return fmt.Sprintf("join response of cluster %s (%s) with %d members", r.Name, r.ID, len(r.Members))
}

// LogValue keeps the secrets out of logs.
func (r JoinResponse) LogValue() slog.Value { return slog.StringValue(r.String()) }

// MarshalJSON always fails; [Server.Handler] sends the response.
func (r JoinResponse) MarshalJSON() ([]byte, error) { return nil, errSecretJSON }

// Format prints no secret, whatever the verb.
func (s Secrets) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.String()) }

// String says that the value is secret.
func (s Secrets) String() string { return "secrets (redacted)" }

// LogValue keeps the secrets out of logs.
func (s Secrets) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalJSON always fails; see [SealSecrets].
func (s Secrets) MarshalJSON() ([]byte, error) { return nil, errSecretJSON }

// Format prints no secret, whatever the verb.
func (k SealingKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, k.String()) }

// String says that the value is secret.
func (k SealingKey) String() string { return "sealing key (redacted)" }

// LogValue keeps the key out of logs.
func (k SealingKey) LogValue() slog.Value { return slog.StringValue(k.String()) }

// MarshalJSON always fails; see [SealingKey.Save].
func (k SealingKey) MarshalJSON() ([]byte, error) { return nil, errSecretJSON }
