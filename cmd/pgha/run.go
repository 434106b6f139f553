package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"

	"github.com/urfave/cli/v2"
	"gopkg.in/natefinch/lumberjack.v2"

	"pgha/node"
	"pgha/systemd"
)

func runCommand() *cli.Command {
	return &cli.Command{
		Name: "run", Category: "daemon",
		Usage: "run this host's node in the foreground (the systemd unit does this)",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "check", Usage: "only see whether this program could run it"}},
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			if err := node.CheckRoot(); err != nil {
				return err
			}
			if c.Bool("check") {
				return node.Check(node.DefaultPaths())
			}
			return runNode(c.Context, node.DefaultPaths(), os.Stderr)
		},
	}
}

// runNode runs the daemon until ctx ends. The log goes to w as text and to the
// log file as JSON, where pgha logs reads it.
func runNode(ctx context.Context, paths node.Paths, w io.Writer) error {
	cfg, err := node.LoadConfig(paths.Config())
	if err != nil {
		return err
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.Log.Level)); err != nil {
		return fmt.Errorf("read log level: %w", err)
	}
	file := &lumberjack.Logger{Filename: paths.DaemonLog(), MaxSize: 20, MaxBackups: 5}
	defer func() { _ = file.Close() }() // it is written through; nothing is lost
	opts := &slog.HandlerOptions{Level: level}
	kept := slog.NewJSONHandler(file, opts)
	log := slog.New(slog.NewMultiHandler(slog.NewTextHandler(w, opts), kept))
	image, err := node.BeginImage(paths, log)
	if err != nil {
		return err
	}
	n, err := node.Open(node.Options{Paths: paths, Log: log, Foreground: !systemd.Available() || os.Getenv("INVOCATION_ID") == "", Image: image})
	if err != nil {
		// Whoever started it is told by the error; pgha status finds it in the file.
		slog.New(kept).Error("cannot start", "component", "pgha", "err", err)
		return image.Ended(ctx, err)
	}
	return image.Ended(ctx, n.Run(ctx))
}

func versionCommand() *cli.Command {
	return &cli.Command{
		Name: "version", Usage: "print the version", Flags: []cli.Flag{jsonFlag},
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			if c.Bool("json") {
				return printJSON(os.Stdout, node.Self(runtime.Version()))
			}
			fmt.Printf("pgha %s (%s)\n", node.Version, runtime.Version())
			return nil
		},
	}
}
