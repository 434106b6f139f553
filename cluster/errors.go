package cluster

import (
	"errors"
	"fmt"
	"net/http"
)

// Code names the reason of a refusal. It travels in the join protocol, so a
// code keeps its meaning for ever.
type Code string

// The reasons for which a join, a renewal or a store operation is refused.
const (
	CodeBadRequest      Code = "bad_request"
	CodeTokenMalformed  Code = "token_malformed"
	CodeTokenVersion    Code = "token_version"
	CodeTokenUnknown    Code = "token_unknown"
	CodeTokenLocked     Code = "token_locked"
	CodeTokenRevoked    Code = "token_revoked"
	CodeTokenExpired    Code = "token_expired"
	CodeTokenUsed       Code = "token_used"
	CodeTokenRole       Code = "token_role"
	CodeTokenName       Code = "token_name"
	CodeNameTaken       Code = "name_taken"
	CodeAddressTaken    Code = "address_taken"
	CodeClocksApart     Code = "clocks_apart"
	CodePGMajor         Code = "pg_major"
	CodeVersion         Code = "version"
	CodeCannotSign      Code = "cannot_sign"
	CodeMembership      Code = "membership"
	CodeUnavailable     Code = "unavailable"
	CodeTooManyAttempts Code = "too_many_attempts"
	CodeUnreachable     Code = "unreachable"
	CodePinMismatch     Code = "pin_mismatch"
	CodeOtherCluster    Code = "other_cluster"
	CodeConflict        Code = "conflict"
	CodeNoCluster       Code = "no_cluster"
	CodeNoMember        Code = "no_member"
	CodeNoToken         Code = "no_token"
)

// Error is a refusal: a code for programs, a message for people. It is also
// the body of an error answer of the join API.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
	// cause is for the log of the node that refuses; it is never sent.
	cause error
}

// Error returns the message; it is complete without the code.
func (e *Error) Error() string {
	if e.Message == "" {
		return string(e.Code)
	}
	return e.Message
}

// Unwrap returns the underlying error, if any.
func (e *Error) Unwrap() error { return e.cause }

// Is makes errors.Is(err, ErrTokenUsed) compare codes.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Message == "" && t.Code == e.Code
}

// Sentinels for errors.Is. Errors returned carry the same code and a message.
var (
	ErrBadRequest      = &Error{Code: CodeBadRequest}
	ErrTokenMalformed  = &Error{Code: CodeTokenMalformed}
	ErrTokenVersion    = &Error{Code: CodeTokenVersion}
	ErrTokenUnknown    = &Error{Code: CodeTokenUnknown}
	ErrTokenLocked     = &Error{Code: CodeTokenLocked}
	ErrTokenRevoked    = &Error{Code: CodeTokenRevoked}
	ErrTokenExpired    = &Error{Code: CodeTokenExpired}
	ErrTokenUsed       = &Error{Code: CodeTokenUsed}
	ErrTokenRole       = &Error{Code: CodeTokenRole}
	ErrTokenName       = &Error{Code: CodeTokenName}
	ErrNameTaken       = &Error{Code: CodeNameTaken}
	ErrAddressTaken    = &Error{Code: CodeAddressTaken}
	ErrClocksApart     = &Error{Code: CodeClocksApart}
	ErrPGMajor         = &Error{Code: CodePGMajor}
	ErrVersion         = &Error{Code: CodeVersion}
	ErrCannotSign      = &Error{Code: CodeCannotSign}
	ErrMembership      = &Error{Code: CodeMembership}
	ErrUnavailable     = &Error{Code: CodeUnavailable}
	ErrTooManyAttempts = &Error{Code: CodeTooManyAttempts}
	ErrUnreachable     = &Error{Code: CodeUnreachable}
	ErrPinMismatch     = &Error{Code: CodePinMismatch}
	ErrOtherCluster    = &Error{Code: CodeOtherCluster}
	ErrConflict        = &Error{Code: CodeConflict}
	ErrNoCluster       = &Error{Code: CodeNoCluster}
	ErrNoMember        = &Error{Code: CodeNoMember}
	ErrNoToken         = &Error{Code: CodeNoToken}
)

func refuse(c Code, format string, args ...any) *Error {
	return &Error{Code: c, Message: fmt.Sprintf(format, args...)}
}

// because attaches the cause that only the refusing node's log may show.
func (e *Error) because(cause error) *Error {
	e.cause = cause
	return e
}

// status is the HTTP status that goes with the code.
func (c Code) status() int {
	switch c {
	case CodeBadRequest, CodeTokenMalformed, CodeTokenVersion:
		return http.StatusBadRequest
	case CodeTokenUnknown, CodeTokenLocked, CodeTokenRevoked, CodeTokenExpired, CodeTokenUsed:
		return http.StatusUnauthorized
	case CodeTokenRole, CodeTokenName, CodeNoMember, CodeOtherCluster:
		return http.StatusForbidden
	case CodeTooManyAttempts:
		return http.StatusTooManyRequests
	case CodeNameTaken, CodeAddressTaken, CodeClocksApart, CodePGMajor, CodeVersion, CodeConflict:
		return http.StatusConflict
	default:
		return http.StatusServiceUnavailable
	}
}

func isCode(err error, c Code) bool { return errors.Is(err, &Error{Code: c}) }
