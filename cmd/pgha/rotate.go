package main

import (
	"errors"

	"github.com/urfave/cli/v2"

	"pgha/node"
)

func rotateCommand() *cli.Command {
	return &cli.Command{
		Name: "rotate", Category: "settings", Usage: "replace the cluster's passwords or its certificate authority; no session breaks",
		Subcommands: []*cli.Command{
			{
				Name: "passwords", Usage: "new passwords for Patroni's API and the status page, on all data nodes",
				Description: "The database roles that pgha uses log in by certificate and have no passwords.\nA node that is down takes the new ones when it returns.",
				Flags:       []cli.Flag{timeoutFlag, jsonFlag}, Action: rotatePasswords,
			},
			{
				Name: "ca", Usage: "replace the certificate authority, in three steps: this, then --sign, then --finish",
				Description: "pgha rotate ca           makes a new CA, which every member trusts beside the present one\n" +
					"pgha rotate ca --sign    reissues all certificates by it, once clients have the file of both (pgha cert ca)\n" +
					"pgha rotate ca --finish  takes the former CA out of trust\n" +
					"pgha rotate ca --back    undoes the first or the second step\n\n" +
					"A step that is interrupted, or waits for a node that is down, goes on when the command is repeated.",
				Flags: append([]cli.Flag{
					&cli.BoolFlag{Name: "sign", Usage: "have the new CA sign all certificates"},
					&cli.BoolFlag{Name: "finish", Usage: "trust the new CA alone"},
					&cli.BoolFlag{Name: "back", Usage: "undo the last step"},
					&cli.BoolFlag{Name: "former-destroyed", Usage: "with --finish or --back: the machines that recover left behind are destroyed or were reset"},
				}, operationFlags...),
				Action: rotateCA,
			},
		},
	}
}

func rotatePasswords(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	return operate(c, "rotate-passwords", struct{}{})
}

func rotateCA(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	req, question := node.RotateCARequest{Step: node.RotateCAStart}, ""
	asked := 0
	for _, f := range []struct{ flag, step, question string }{
		{"sign", node.RotateCASign, "Clients that check the server and have only the former CA cannot connect from now on (--back undoes it). Have all clients got the file of both?"},
		{"finish", node.RotateCAFinish, "The former CA is trusted no more; this cannot be undone. Go on?"},
		{"back", node.RotateCABack, "Undo the last step of the replacement of the CA?"},
	} {
		if c.Bool(f.flag) {
			asked++
			req.Step, question = f.step, f.question
		}
	}
	if asked > 1 {
		return errors.New("--sign, --finish and --back exclude each other: give one")
	}
	if req.FormerDestroyed = c.Bool("former-destroyed"); req.FormerDestroyed && req.Step != node.RotateCAFinish && req.Step != node.RotateCABack {
		return errors.New("--former-destroyed goes with --finish or --back, which drop a CA")
	}
	if question != "" {
		if err := confirm(c.Bool("yes"), question); err != nil {
			return err
		}
	}
	return operate(c, "rotate-ca", req)
}
