package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/urfave/cli/v2"

	"pgha/node"
)

var timeoutFlag = &cli.DurationFlag{Name: "timeout", Usage: "give up after this long; what is begun may be left half done, and is said", DefaultText: "one hour"}

// operationFlags are what every operation takes.
var operationFlags = []cli.Flag{timeoutFlag, yesFlag, jsonFlag}

// operate has the local daemon run an operation: it prints each step, and at the
// end the status that the cluster is in.
func operate(c *cli.Context, kind string, req any) error {
	answer, err := perform(c, newProgress(), kind, req)
	if err != nil {
		return err
	}
	return finish(c, kind, answer)
}

// perform has the local daemon run an operation and prints each step.
func perform(c *cli.Context, p *progress, kind string, req any) (json.RawMessage, error) {
	id, err := uuid.NewRandom()
	if err != nil {
		return nil, fmt.Errorf("make id of operation: %w", err)
	}
	body, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	if c.Duration("timeout") < 0 {
		return nil, errors.New("--timeout is below 0: give a time such as 5m")
	}
	var answer json.RawMessage
	o := node.OperationRequest{ID: id.String(), Actor: operator(), Timeout: c.Duration("timeout"), Request: body}
	err = node.NewLocal(node.DefaultPaths()).Operate(c.Context, kind, o, &answer, func(step string) { p.say("%s", step) })
	return answer, err
}

// finish prints the result of an operation and the status that the cluster is in.
func finish(c *cli.Context, kind string, result any) error {
	return finishWith(c, kind, map[string]any{"result": result})
}

// finishWith is finish for an operation of several parts: document is what --json
// prints, to which the status is added.
func finishWith(c *cli.Context, kind string, document map[string]any) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.Context), 15*time.Second)
	defer cancel()
	s, err := node.NewLocal(node.DefaultPaths()).Status(ctx)
	if err != nil {
		err = fmt.Errorf("%s is done, but the status cannot be read: %w", kind, err)
		if c.Bool("json") {
			document["status"] = nil
			err = errors.Join(err, printJSON(os.Stdout, document))
		}
		return err
	}
	if c.Bool("json") {
		document["status"] = s
		return printJSON(os.Stdout, document)
	}
	fmt.Fprintln(os.Stderr)
	printStatus(os.Stdout, s)
	return nil
}

// operator is who runs this command: the user behind sudo, where there is one.
func operator() string {
	if name := os.Getenv("SUDO_USER"); name != "" && !strings.ContainsAny(name, "@ \t\n") {
		return name
	}
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return fmt.Sprintf("uid %d", os.Getuid())
}
