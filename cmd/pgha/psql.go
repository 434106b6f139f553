package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"pgha/cluster"
	"pgha/node"
)

func psqlCommand() *cli.Command {
	return &cli.Command{
		Name: "psql", Category: "cluster",
		Usage:     "open a TLS session as the superuser, on the primary or on --node",
		ArgsUsage: "[--node NAME] [psql's own options and arguments]",
		// All options but the first --node are psql's.
		SkipFlagParsing: true,
		Action:          runPsql,
	}
}

// psqlNode takes a leading --node NAME off the arguments.
func psqlNode(args []string) (name string, rest []string, err error) {
	if len(args) == 0 {
		return "", nil, nil
	}
	name, ok := strings.CutPrefix(args[0], "--node=")
	rest = args[1:]
	switch {
	case !ok && args[0] != "--node":
		return "", args, nil
	case !ok && len(rest) > 0:
		name, rest = rest[0], rest[1:]
	}
	if name == "" || name == "--node" {
		return "", nil, errors.New("--node needs the name of a data node")
	}
	return name, rest, nil
}

func runPsql(c *cli.Context) error {
	if first := c.Args().First(); first == "--help" || first == "-h" {
		return cli.ShowSubcommandHelp(c)
	}
	name, args, err := psqlNode(c.Args().Slice())
	if err != nil {
		return err
	}
	if err := node.CheckRoot(); err != nil {
		return err
	}
	paths := node.DefaultPaths()
	state, err := node.LoadState(paths)
	if err != nil {
		return err
	}
	if state.Role == cluster.RoleWitness {
		return errors.New("a witness holds no key to the data: run pgha psql on a data node")
	}
	s, err := node.NewLocal(paths).Status(c.Context)
	if err != nil {
		return err
	}
	want := firstOf(name, s.Leader)
	if want == "" {
		return fmt.Errorf("there is no primary to connect to (%s): see pgha status, or name a node with --node", s.Verdict)
	}
	var names []string
	for _, m := range s.Members {
		if m.Role != cluster.RoleData {
			continue
		}
		names = append(names, m.Name)
		if m.Name == want {
			return execPsql(paths, m, args)
		}
	}
	return fmt.Errorf("%q is no data node of this cluster: use one of %s", want, strings.Join(names, ", "))
}

// execPsql replaces this process by psql. The certificate is the credential:
// no password is on the command line or in the environment.
func execPsql(paths node.Paths, m node.MemberStatus, args []string) error {
	bin, err := exec.LookPath("psql")
	if err != nil {
		return errors.New("psql is not installed: apt-get install postgresql-client")
	}
	env := []string{}
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "PG") || strings.HasPrefix(e, "PGHA") || strings.HasPrefix(e, "PGOPTIONS=") {
			env = append(env, e)
		}
	}
	cert := node.AdminBundlePath(paths)
	env = append(env,
		"PGHOST="+m.Addr.String(), fmt.Sprintf("PGPORT=%d", m.PostgresPort), "PGUSER=postgres", "PGDATABASE=postgres",
		"PGSSLMODE=verify-full", "PGSSLROOTCERT="+node.CAPath(paths), "PGSSLCERT="+cert, "PGSSLKEY="+cert, "PGCONNECT_TIMEOUT=10")
	if err := syscall.Exec(bin, append([]string{"psql"}, args...), env); err != nil {
		return fmt.Errorf("run psql: %w", err)
	}
	return nil
}
