package cluster

// HTTPStatus is the status with which an API answers a refusal.
func (c Code) HTTPStatus() int { return c.status() }

// Repeatable tells whether the same join may be tried again with the same
// files: the refusal says nothing against this node, or the member may have
// been written already.
func (e *Error) Repeatable() bool {
	switch e.Code {
	case CodeMembership, CodeUnavailable, CodeUnreachable, CodeCannotSign, CodeTooManyAttempts:
		return true
	}
	return false
}
