package node

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"syscall"

	"pgha/cluster"
)

// streamLine bounds a line of an answer, in bytes.
const streamLine = 4 << 20

// stream asks the daemon for an answer of many lines, each a JSON value, and
// hands them to line until that says that it was the last. It returns the last
// that came.
func (l *Local) stream(ctx context.Context, method, path string, in any, line func(json.RawMessage) (last bool, err error)) (json.RawMessage, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("encode request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://pgha"+path, body)
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	resp, err := l.http.Do(req)
	if err != nil {
		return nil, localError(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode >= 300 {
		data, err := io.ReadAll(io.LimitReader(resp.Body, peerBody))
		if err != nil {
			return nil, fmt.Errorf("read answer: %w", err)
		}
		var e cluster.Error
		if json.Unmarshal(data, &e) == nil && e.Message != "" {
			return nil, &e
		}
		return nil, fmt.Errorf("the daemon answered %s", resp.Status)
	}
	var last json.RawMessage
	s := bufio.NewScanner(resp.Body)
	s.Buffer(nil, streamLine)
	for s.Scan() {
		last = bytes.Clone(s.Bytes())
		if end, err := line(last); end || err != nil {
			return last, err
		}
	}
	if err := s.Err(); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return last, fmt.Errorf("read answer: %w", err)
	}
	return last, nil
}

// localError says in words why the daemon could not be spoken to.
func localError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return ErrNotRunning
	case errors.Is(err, os.ErrPermission):
		return errors.New("speak to pgha: this needs root: run it with sudo")
	}
	return err
}
