package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/node"
)

func eventsCommand() *cli.Command {
	return &cli.Command{
		Name: "events", Category: "cluster",
		Usage:       "show what has happened in the cluster, and who did it",
		Description: "The cluster keeps the newest 2000 events, and every node shows the same.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "go on until Ctrl-C"},
			&cli.StringFlag{Name: "since", Usage: "from `TIME` on, as 2h, 2026-01-31 or 2026-01-31T12:00:00Z"},
			&cli.IntFlag{Name: "lines", Aliases: []string{"n"}, Value: 50, Usage: "of the past, show the last `N` at most; 0 shows all"},
			jsonFlag,
		},
		Action: showEvents,
	}
}

func showEvents(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	since, err := parseSince(c.String("since"), time.Now())
	if err != nil {
		return err
	}
	lines := c.Int("lines")
	if lines < 0 {
		return fmt.Errorf("--lines %d is below 0", lines)
	}
	if c.IsSet("since") && !c.IsSet("lines") {
		lines = 0
	}
	out := json.NewEncoder(os.Stdout)
	return node.NewLocal(node.DefaultPaths()).Events(c.Context, since, lines, c.Bool("follow"), func(e node.Event) {
		if c.Bool("json") {
			_ = out.Encode(e) // standard output is gone: nobody to tell
			return
		}
		printEvent(os.Stdout, e)
	})
}

func printEvent(w io.Writer, e node.Event) {
	about := e.Subject
	if about == "" {
		about = "-"
	}
	fmt.Fprintf(w, "%s  %-10s  %-12s  %s (%s)\n", e.At.Local().Format("2006-01-02 15:04:05.000"), e.Kind, about, e.Text, e.Actor)
}

// parseSince reads a point in time, or how long ago it was; "" is the beginning.
func parseSince(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02 15:04:05", "2006-01-02 15:04", time.DateOnly} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("--since %q is no time: write it as 2h, 2026-01-31 or 2026-01-31T12:00:00Z", s)
}
