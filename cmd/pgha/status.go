package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/cluster"
	"pgha/node"
	"pgha/systemd"
)

func statusCommand() *cli.Command {
	return &cli.Command{
		Name: "status", Category: "cluster",
		Usage:       "show the cluster, and whether the loss of any one node is survivable now",
		Description: "Exit status: 0 healthy, 1 degraded, 2 no primary, 3 cannot tell.",
		Flags:       []cli.Flag{jsonFlag},
		Action: func(c *cli.Context) error {
			err := noArgs(c)
			if err == nil {
				err = showStatus(c.Context, node.DefaultPaths(), c.Bool("json"))
			}
			return cannotTell(err)
		},
	}
}

// cannotTell gives an error of status the exit status that says so: any other
// would be taken for the cluster's condition.
func cannotTell(err error) error {
	var exit exitError
	if err == nil || errors.As(err, &exit) {
		return err
	}
	return exitError{int(node.Unknown), err}
}

// statusTimeout bounds the wait for the daemon, which itself waits for no one for
// longer than a few seconds.
const statusTimeout = 15 * time.Second

func showStatus(ctx context.Context, paths node.Paths, asJSON bool) error {
	asked, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	s, err := node.NewLocal(paths).Status(asked)
	if err != nil {
		return statusDown(ctx, paths, asJSON, err)
	}
	if asJSON {
		err = printJSON(os.Stdout, s)
	} else {
		printStatus(os.Stdout, s)
	}
	if err == nil && s.Health != node.Healthy {
		return exitError{code: int(s.Health)}
	}
	return err
}

// statusDown says what can be said without the daemon.
func statusDown(ctx context.Context, paths node.Paths, asJSON bool, cause error) error {
	why := cause.Error()
	todo := []string{}
	state, err := node.LoadState(paths)
	switch {
	case err != nil && !errors.Is(err, node.ErrNoNode) && os.Geteuid() != 0:
		why, todo = "pgha status needs root", []string{"sudo pgha status"}
	case err != nil:
		why = err.Error()
	case state.Removed != nil:
		why, todo = state.Removed.RemovalText(state.ClusterName), []string{node.RemovalToDo}
	case errors.Is(cause, context.DeadlineExceeded):
		why = fmt.Sprintf("pgha runs on this host and has not answered within %s", statusTimeout)
		todo = append(todo, "see what it does: pgha logs", "ask another node: the rest of the cluster may well be up")
	case errors.Is(cause, node.ErrNotRunning):
		why = fmt.Sprintf("pgha is not running on this host, which is the %s node %q of cluster %q", state.Role, state.Node, state.ClusterName)
		if _, err := node.LoadConfig(paths.Config()); err != nil {
			why += "; it cannot start: " + err.Error()
		} else if line := node.LastLogError(paths); line != "" {
			why += "; its last error: " + line
		}
		todo = append(todo, unitHints(ctx)...)
		todo = append(todo, "ask another node: the rest of the cluster may well be up")
	}
	if asJSON {
		if err := printJSON(os.Stdout, map[string]any{"health": node.Unknown, "verdict": why, "to_do": todo}); err != nil {
			return err
		}
		return exitError{code: int(node.Unknown)}
	}
	fmt.Println(why)
	printToDo(os.Stdout, todo)
	return exitError{code: int(node.Unknown)}
}

// unitHints says what systemd thinks and what to run.
func unitHints(ctx context.Context) []string {
	if !systemd.Available() {
		return []string{"start it: pgha run"}
	}
	st, err := systemd.State(ctx)
	if err != nil {
		return []string{"systemctl status pgha"}
	}
	return []string{fmt.Sprintf("the unit is %s (%s): systemctl start pgha, then journalctl -u pgha", st.ActiveState, st.SubState)}
}

// printStatus writes the page an operator lives by.
func printStatus(w io.Writer, s node.Status) {
	generation := ""
	if s.Generation > 1 {
		generation = fmt.Sprintf(", generation %d", s.Generation)
	}
	fmt.Fprintf(w, "Cluster  %s (%s)%s, seen by %s\n", s.Cluster, s.ClusterID, generation, s.SeenBy)
	fmt.Fprintf(w, "Promise  %s\n", s.Promise.Text)
	if s.Gate != nil {
		fmt.Fprintf(w, "Gate     %s\n", s.Gate.GateText())
		if len(s.Gate.Failovers) > 0 {
			fmt.Fprintf(w, "Failover %s\n", node.FailoverText(s.Gate.Failovers[0]))
		}
	}
	if s.Planned != nil {
		fmt.Fprintf(w, "Planned  %s (pgha switchover --cancel)\n", s.Planned)
	}
	fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "MEMBER\tADDRESS\tROLE\tSTATE\tTL\tLAG\tETCD\tCERTIFICATE ENDS")
	for _, m := range s.Members {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", m.Name, m.Addr, roleText(m), stateText(m), numberOr(m.Timeline), lagText(m), etcdText(m), dateText(m.CertExpires))
	}
	// The table goes to memory of our own or a terminal; there is nobody to
	// report a failed write to.
	_ = t.Flush()
	fmt.Fprintf(w, "\nRead-write  %s\nRead-only   %s\n\n", strings.Join(s.ReadWrite, "  "), strings.Join(s.ReadOnly, "  "))
	if s.Waiting != "" {
		fmt.Fprintf(w, "This node is starting: %s\n", s.Waiting)
	}
	fmt.Fprintf(w, "%s: %s\n", strings.ToUpper(s.Health.String()), s.Verdict)
	printToDo(w, s.ToDo)
}

func printToDo(w io.Writer, todo []string) {
	for _, t := range todo {
		fmt.Fprintf(w, "  -> %s\n", t)
	}
}

func roleText(m node.MemberStatus) string {
	switch {
	case m.Role == cluster.RoleWitness:
		return "witness"
	case m.Postgres == "primary":
		return "primary"
	case m.Sync:
		return "replica (sync)"
	case m.Postgres == "replica":
		return "replica"
	}
	return "-"
}

func stateText(m node.MemberStatus) string {
	switch {
	case !m.Reachable && m.Waiting != "":
		return "joining"
	case !m.Reachable && m.Postgres != "":
		return "PGHA DOWN"
	case !m.Reachable:
		return "UNREACHABLE"
	case m.Role == cluster.RoleWitness:
		return "running"
	case m.State == "":
		return "starting"
	case m.Maintenance != nil:
		return m.State + " (maintenance)"
	}
	return m.State
}

func etcdText(m node.MemberStatus) string {
	if m.EtcdLeader {
		return m.Etcd + " (leader)"
	}
	return m.Etcd
}

func lagText(m node.MemberStatus) string {
	switch {
	case m.Role == cluster.RoleWitness || m.Postgres == "primary":
		return "-"
	case m.LagBytes < 0:
		return "unknown"
	}
	return node.FormatBytes(uint64(m.LagBytes))
}

func numberOr(n int) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprint(n)
}

func dateText(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return fmt.Sprintf("%s (%d days)", t.Local().Format(time.DateOnly), int(time.Until(t).Hours()/24))
}
