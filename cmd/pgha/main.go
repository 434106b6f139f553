// Command pgha runs PostgreSQL on two VMs and a witness so that it survives
// the loss of any one of them.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"pgha/lab"
	"pgha/node"
)

func main() {
	lab.MaybeInit() // does not return in the first process of a lab's host
	os.Exit(run(os.Args))
}

// exitError carries an exit status of its own, and what to say; with a nil err
// everything has been said.
type exitError struct {
	code int
	err  error
}

func (e exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e exitError) Unwrap() error { return e.err }

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	app := newApp()
	err := app.RunContext(ctx, flagsFirst(app, args))
	if err == nil {
		return 0
	}
	if next := (*node.Reexec)(nil); errors.As(err, &next) {
		err = next.Exec(ctx) // comes back only when it fails
	}
	exit := exitError{code: 1, err: err}
	errors.As(err, &exit)
	if exit.err != nil {
		fmt.Fprintln(os.Stderr, "pgha: "+err.Error())
	}
	return exit.code
}

func newApp() *cli.App {
	app := &cli.App{
		Name:    "pgha",
		Usage:   "PostgreSQL that survives the loss of a machine",
		Version: node.Version,
		Description: "On the first VM:   pgha init\n" +
			"On the second VM:  pgha join TOKEN\n" +
			"On a small third:  pgha join --witness TOKEN",
		EnableBashCompletion: true,
		HideVersion:          true,
		Suggest:              true,
		// main prints errors, once.
		ExitErrHandler: func(*cli.Context, error) {},
		OnUsageError: func(_ *cli.Context, err error, _ bool) error {
			return fmt.Errorf("%w: see pgha help", err)
		},
		Commands: []*cli.Command{
			initCommand(), joinCommand(), statusCommand(), configCommand(), tokenCommand(), psqlCommand(), logsCommand(),
			certCommand(), runCommand(), resetCommand(), memberCommand(), leaveCommand(), demoCommand(), versionCommand(), completionCommand(), eventsCommand(), rotateCommand(),
			switchoverCommand(), failoverCommand(), pauseCommand(), resumeCommand(), maintenanceCommand(), upgradeCommand(), recoverCommand(), snapshotCommand(),
			restartCommand(), reloadCommand(), reinitCommand(), dbCommand(), userCommand(),
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("no command %q: see pgha help", c.Args().First())
			}
			return cli.ShowAppHelp(c)
		},
	}
	for _, c := range app.Commands {
		plainUsageErrors(c)
	}
	return app
}

// plainUsageErrors has a wrong flag answered by one line instead of the help.
func plainUsageErrors(c *cli.Command) {
	c.OnUsageError = func(ctx *cli.Context, err error, _ bool) error {
		err = fmt.Errorf("%w: see %s --help", err, ctx.Command.HelpName)
		if ctx.Command.Name == "status" {
			return cannotTell(err)
		}
		return err
	}
	var names []string
	for _, sub := range c.Subcommands {
		plainUsageErrors(sub)
		names = append(names, sub.Name)
	}
	if c.Action == nil { // it only groups others
		c.Action = func(ctx *cli.Context) error {
			if ctx.Args().Present() {
				return fmt.Errorf("no command %q: use %s with one of %s", ctx.Args().First(), ctx.Command.HelpName, strings.Join(names, ", "))
			}
			return cli.ShowSubcommandHelp(ctx)
		}
	}
}

var jsonFlag = &cli.BoolFlag{Name: "json", Usage: "print JSON"}
var yesFlag = &cli.BoolFlag{Name: "yes", Aliases: []string{"y"}, Usage: "do not ask"}

// noArgs refuses arguments that a command would ignore.
func noArgs(c *cli.Context) error {
	if c.Args().Present() {
		return fmt.Errorf("%s takes no argument, but was given %q", strings.TrimPrefix(c.Command.HelpName, "pgha "), c.Args().First())
	}
	return nil
}
