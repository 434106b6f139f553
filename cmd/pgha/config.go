package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/cluster"
	"pgha/node"
)

var nodeFlag = &cli.StringFlag{Name: "node", Usage: "of this node alone"}

func configCommand() *cli.Command {
	dryRun := &cli.BoolFlag{Name: "dry-run", Usage: "show what would change, and change nothing"}
	restart := &cli.BoolFlag{Name: "restart", Usage: "then restart PostgreSQL where a change needs it, one node after the other"}
	change := append([]cli.Flag{nodeFlag, dryRun, restart}, operationFlags...)
	return &cli.Command{
		Name: "config", Category: "settings", Usage: "show and change the settings of the cluster and of PostgreSQL",
		Subcommands: []*cli.Command{
			{Name: "show", Usage: "list the settings, and where each comes from", Flags: []cli.Flag{
				&cli.BoolFlag{Name: "all", Usage: "every parameter of PostgreSQL, also those that nobody has set"}, nodeFlag, jsonFlag,
			}, Action: showConfig},
			{Name: "get", Usage: "print one setting's value", ArgsUsage: "KEY", Flags: []cli.Flag{nodeFlag}, Action: getConfig},
			{Name: "set", Usage: "change settings on all nodes, while they run", ArgsUsage: "KEY=VALUE...", Flags: change, Action: setConfig,
				Description: "KEY is a setting of pgha config show; postgresql.NAME is a parameter of PostgreSQL.\n" +
					"A list takes KEY+=VALUE and KEY-=VALUE too. Several changes are made as one."},
			{Name: "unset", Usage: "go back to a setting's default", ArgsUsage: "KEY...", Flags: change, Action: unsetConfig},
			{Name: "edit", Usage: "change all settings in an editor", Flags: append([]cli.Flag{restart}, operationFlags...), Action: editConfig},
			{Name: "diff", Usage: "show what differs between now and before a change (the last)", ArgsUsage: "[CHANGE]", Flags: []cli.Flag{jsonFlag}, Action: diffConfig},
			{Name: "history", Usage: "list the changes: when, who, what", Flags: []cli.Flag{
				&cli.IntFlag{Name: "n", Value: 20, Usage: "so many, the newest; 0 = all that are kept"}, jsonFlag,
			}, Action: configHistory},
			{Name: "rollback", Usage: "go back to the settings before a change", ArgsUsage: "CHANGE", Flags: append([]cli.Flag{dryRun, restart}, operationFlags...), Action: rollbackConfig},
		},
	}
}

func showConfig(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	v, err := node.NewLocal(node.DefaultPaths()).Config(c.Context)
	if err != nil {
		return err
	}
	if err := checkNode(v, c.String("node")); err != nil {
		return err
	}
	v.Values = slices.DeleteFunc(v.Values, func(x node.ConfigValue) bool {
		return x.Quiet && !c.Bool("all") || c.String("node") != "" && x.Node != "" && x.Node != c.String("node")
	})
	if c.Bool("json") {
		return printJSON(os.Stdout, v)
	}
	if err := printConfig(os.Stdout, v); err != nil {
		return err
	}
	if len(v.Silent) > 0 {
		fmt.Fprintf(os.Stderr, "%s did not answer.\n", strings.Join(v.Silent, " and "))
	}
	return nil
}

// checkNode refuses a node that has no settings; "" is all nodes.
func checkNode(v node.ConfigView, name string) error {
	if name == "" || slices.Contains(v.Nodes, name) {
		return nil
	}
	return fmt.Errorf("there is no data node %q: use one of %s", name, strings.Join(v.Nodes, ", "))
}

func printConfig(w io.Writer, v node.ConfigView) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "KEY\tNODE\tVALUE\tWHERE IT COMES FROM\tPENDING RESTART")
	or := func(s, other string) string {
		if s == "" {
			return other
		}
		return s
	}
	for _, x := range v.Values {
		restart := "-"
		if len(x.Restart) > 0 {
			restart = "on " + strings.Join(x.Restart, ", ")
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", x.Key, or(x.Node, "all"), or(x.Value, "-"), x.Where, restart)
	}
	return t.Flush()
}

func getConfig(c *cli.Context) error {
	if c.NArg() != 1 {
		return errors.New("config get needs one KEY: see pgha config show --all")
	}
	v, err := node.NewLocal(node.DefaultPaths()).Config(c.Context)
	if err != nil {
		return err
	}
	if err := checkNode(v, c.String("node")); err != nil {
		return err
	}
	found := false
	for _, x := range v.Values {
		if !strings.EqualFold(x.Key, c.Args().First()) || c.String("node") != "" && x.Node != "" && x.Node != c.String("node") {
			continue
		}
		found = true
		if x.Node != "" && c.String("node") == "" {
			fmt.Printf("%s: %s\n", x.Node, x.Value)
			continue
		}
		fmt.Println(x.Value)
	}
	if !found {
		return fmt.Errorf("there is no setting %q: see pgha config show --all", c.Args().First())
	}
	return nil
}

func setConfig(c *cli.Context) error {
	req := node.ConfigRequest{Node: c.String("node")}
	for _, arg := range c.Args().Slice() {
		key, value, ok := strings.Cut(arg, "=")
		if !ok || key == "" {
			return fmt.Errorf("config set takes KEY=VALUE, as profile=steady or postgresql.work_mem=64MB, and was given %q: see pgha config show", arg)
		}
		change := node.ConfigChange{Key: key, Value: value}
		if k, ok := strings.CutSuffix(key, "+"); ok {
			change.Key, change.Op = k, node.ChangeAdd
		} else if k, ok := strings.CutSuffix(key, "-"); ok {
			change.Key, change.Op = k, node.ChangeRemove
		}
		req.Changes = append(req.Changes, change)
	}
	if len(req.Changes) == 0 {
		return errors.New("config set needs a KEY=VALUE, as profile=steady: see pgha config show")
	}
	return askAndChange(c, req)
}

func unsetConfig(c *cli.Context) error {
	req := node.ConfigRequest{Node: c.String("node")}
	for _, key := range c.Args().Slice() {
		if strings.Contains(key, "=") {
			return fmt.Errorf("config unset takes a KEY alone, and was given %q", key)
		}
		req.Changes = append(req.Changes, node.ConfigChange{Key: key, Op: node.ChangeUnset})
	}
	if len(req.Changes) == 0 {
		return errors.New("config unset needs a KEY: see pgha config show")
	}
	return askAndChange(c, req)
}

// askAndChange is changeConfig that asks before what applications may not survive.
func askAndChange(c *cli.Context, req node.ConfigRequest) error {
	if c.Bool("yes") || c.Bool("dry-run") {
		return changeConfig(c, req)
	}
	p, err := node.NewLocal(node.DefaultPaths()).PlanConfig(c.Context, req)
	if err != nil {
		return err
	}
	why := dangers(p, c.Bool("restart"))
	if len(why) == 0 {
		return changeConfig(c, req)
	}
	printPlan(os.Stderr, p)
	fmt.Fprintln(os.Stderr, strings.Join(why, "\n"))
	if err := confirm(false, "Make these changes?"); err != nil {
		return err
	}
	req.Rev = p.Rev
	return changeConfig(c, req)
}

// dangers says what a plan does that applications may notice.
func dangers(p node.ConfigPlan, restart bool) []string {
	var out []string
	for _, d := range p.Diff {
		switch {
		case d.Key == "clients":
			if gone := takenAway(d.Old, d.New); len(gone) > 0 {
				out = append(out, fmt.Sprintf("Clients from %s cannot connect any more, and lose their sessions, unless another network of the new list holds them.", strings.Join(gone, " and ")))
			}
		case d.Key == "async" && d.New == "on":
			out = append(out, "Commits do not wait for a replica any more: a failover may lose the last ones.")
		case d.Key == "hba":
			out = append(out, "Other rules decide who may log in.")
		}
	}
	if restart && len(p.Diff) > 0 {
		out = append(out, "PostgreSQL restarts wherever that is needed, one node after the other, and the primary hands over.")
	}
	return out
}

// takenAway are the networks of one list of clients that another does not cover.
func takenAway(old, next string) []string {
	networks := func(list string) (out []netip.Prefix) {
		for text := range strings.SplitSeq(list, ",") {
			if p, err := netip.ParsePrefix(strings.TrimSpace(text)); err == nil {
				out = append(out, p)
			}
		}
		return out
	}
	var gone []string
	for _, was := range networks(old) {
		if !slices.ContainsFunc(networks(next), func(p netip.Prefix) bool { return p.Bits() <= was.Bits() && p.Contains(was.Addr()) }) {
			gone = append(gone, was.String())
		}
	}
	return gone
}

// changeConfig does a request, or shows what it would do.
func changeConfig(c *cli.Context, req node.ConfigRequest) error {
	if c.Bool("dry-run") {
		p, err := node.NewLocal(node.DefaultPaths()).PlanConfig(c.Context, req)
		if err != nil {
			return err
		}
		if c.Bool("json") {
			return printJSON(os.Stdout, p)
		}
		printPlan(os.Stdout, p)
		fmt.Println("Nothing was changed: this was a dry run.")
		return nil
	}
	progress := newProgress()
	answer, err := perform(c, progress, "config", req)
	if err != nil {
		return err
	}
	var r node.ConfigResult
	if err := json.Unmarshal(answer, &r); err != nil {
		return fmt.Errorf("decode result: %w", err)
	}
	done := map[string]any{"result": answer}
	if c.Bool("restart") && len(r.Pending) > 0 {
		done["restart"], err = perform(c, progress, "restart", node.RestartRequest{Rolling: true, Pending: true})
		if err != nil {
			return fmt.Errorf("change %d is made, and PostgreSQL was to be restarted: %w", r.Change, err)
		}
		r.Pending = nil
	}
	if err := finishWith(c, "config", done); err != nil || c.Bool("json") {
		return err
	}
	printResult(os.Stdout, r)
	return nil
}

// printPlan shows what a request would change.
func printPlan(w io.Writer, p node.ConfigPlan) {
	if len(p.Diff) == 0 {
		fmt.Fprintln(w, "The settings are so already.")
		return
	}
	for _, d := range p.Diff {
		fmt.Fprintln(w, "  "+d.String())
	}
	for _, text := range p.Warnings {
		fmt.Fprintln(w, "  note: "+text)
	}
	if len(p.On) > 0 {
		fmt.Fprintf(w, "  %s needs a restart of PostgreSQL on %s\n", strings.Join(p.Restart, ", "), strings.Join(p.On, ", "))
	}
}

// printNoChange gives --json its document where nothing differs.
func printNoChange(c *cli.Context, p node.ConfigPlan) error {
	if !c.Bool("json") {
		return nil
	}
	return printJSON(os.Stdout, p)
}

// printResult shows what a change came to, and what is left to do.
func printResult(w io.Writer, r node.ConfigResult) {
	fmt.Fprintln(w)
	if r.Change == 0 {
		fmt.Fprintln(w, "The settings are so already: nothing was changed.")
		return
	}
	fmt.Fprintf(w, "Change %d, taken by %s:\n", r.Change, strings.Join(r.Taken, " and "))
	for _, d := range r.Diff {
		fmt.Fprintln(w, "  "+d.String())
	}
	if len(r.Silent) > 0 {
		fmt.Fprintf(w, "%s did not answer, and follows when it is back.\n", strings.Join(r.Silent, " and "))
	}
	if len(r.Pending) > 0 {
		fmt.Fprintf(w, "%s takes effect when PostgreSQL has been restarted on %s: pgha restart --rolling --pending\n", strings.Join(r.Restart, ", "), strings.Join(r.Pending, " and "))
	}
	fmt.Fprintf(w, "To go back: pgha config rollback %d\n", r.Change)
}

func rollbackConfig(c *cli.Context) error {
	id, err := strconv.ParseInt(c.Args().First(), 10, 64)
	if c.NArg() != 1 || err != nil || id < 1 {
		return errors.New("config rollback needs the number of one change: see pgha config history")
	}
	req := node.ConfigRequest{Rollback: id}
	if c.Bool("dry-run") {
		return changeConfig(c, req)
	}
	p, err := node.NewLocal(node.DefaultPaths()).PlanConfig(c.Context, req)
	if err != nil {
		return err
	}
	printPlan(os.Stderr, p)
	if len(p.Diff) == 0 {
		return printNoChange(c, p)
	}
	if err := confirm(c.Bool("yes"), fmt.Sprintf("Go back to the settings before change %d?", id)); err != nil {
		return err
	}
	req.Rev = p.Rev
	return changeConfig(c, req)
}

func diffConfig(c *cli.Context) error {
	h, err := node.NewLocal(node.DefaultPaths()).ConfigHistory(c.Context)
	if err != nil {
		return err
	}
	if c.NArg() > 1 {
		return errors.New("config diff takes the number of one change: see pgha config history")
	}
	if len(h.Changes) == 0 {
		return errors.New("no setting was changed yet")
	}
	from := h.Changes[len(h.Changes)-1]
	if c.NArg() == 1 {
		i := slices.IndexFunc(h.Changes, func(x cluster.SettingsChange) bool { return strconv.FormatInt(x.ID, 10) == c.Args().First() })
		if i < 0 {
			return fmt.Errorf("there is no change %q: changes %d to %d are kept", c.Args().First(), h.Changes[0].ID, from.ID)
		}
		from = h.Changes[i]
	}
	diff := node.DiffSettings(from.Before, h.Now)
	if c.Bool("json") {
		return printJSON(os.Stdout, map[string]any{"since": from.ID, "diff": diff})
	}
	if len(diff) == 0 {
		fmt.Printf("The settings are as before change %d.\n", from.ID)
	}
	for _, d := range diff {
		fmt.Println(d.String())
	}
	return nil
}

func configHistory(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	h, err := node.NewLocal(node.DefaultPaths()).ConfigHistory(c.Context)
	if err != nil {
		return err
	}
	slices.Reverse(h.Changes)
	if n := c.Int("n"); n > 0 {
		h.Changes = h.Changes[:min(n, len(h.Changes))]
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, h.Changes)
	}
	t := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "CHANGE\tWHEN\tWHO\tWHAT")
	for _, x := range h.Changes {
		for i, what := range x.What {
			if i == 0 {
				fmt.Fprintf(t, "%d\t%s\t%s\t%s\n", x.ID, x.At.Format(time.DateTime)+" UTC", x.Actor, what)
			} else {
				fmt.Fprintf(t, "\t\t\t%s\n", what)
			}
		}
	}
	return t.Flush()
}
