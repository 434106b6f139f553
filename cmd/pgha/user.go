package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/node"
	"pgha/sqladmin"
)

func userCommand() *cli.Command {
	return &cli.Command{
		Name: "user", Category: "settings", Usage: "make, list and drop users for applications",
		Subcommands: []*cli.Command{
			{
				Name: "create", ArgsUsage: "NAME", Usage: "make a user, and show how to connect as it, once",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "db", Usage: "let the user work in the database `NAME`"},
					&cli.BoolFlag{Name: "read-only", Usage: "let the user read there, and no more"},
					passwordFileFlag, timeoutFlag, jsonFlag,
				},
				Action: createUser,
			},
			{
				Name: "passwd", ArgsUsage: "NAME", Usage: "give a user another password, and show it once",
				Flags:  []cli.Flag{passwordFileFlag, timeoutFlag, jsonFlag},
				Action: changePassword,
			},
			{
				Name: "drop", ArgsUsage: "NAME", Usage: "drop a user that owns nothing, with its privileges, and end its sessions",
				Flags:  []cli.Flag{timeoutFlag, yesFlag, jsonFlag},
				Action: dropUser,
			},
			{Name: "list", Usage: "list the users", Flags: []cli.Flag{jsonFlag}, Action: listUsers},
		},
	}
}

// secret is a user's password, given or generated.
type secret struct {
	password, verifier string
	generated          bool
}

// readSecret reads the password that --password-file names, or makes one.
func readSecret(c *cli.Context) (s secret, err error) {
	switch path := c.String("password-file"); path {
	case "":
		s.generated = true
		s.password, err = sqladmin.GeneratePassword()
	case "-":
		s.password, err = firstLine(os.Stdin)
	default:
		var f *os.File
		if f, err = os.Open(path); err == nil {
			s.password, err = firstLine(f)
			_ = f.Close() // it was only read
		}
	}
	if err != nil {
		return s, fmt.Errorf("read password: %w", err)
	}
	s.verifier, err = sqladmin.Verifier(s.password)
	return s, err
}

// firstLine reads a password that stands alone on the first line.
func firstLine(r io.Reader) (string, error) {
	const limit = 4096
	line, err := bufio.NewReader(io.LimitReader(r, limit)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	if line = strings.TrimRight(line, "\r\n"); line == "" {
		return "", errNoPassword
	}
	return line, nil
}

func createUser(c *cli.Context) error {
	name, err := theName(c)
	if err == nil {
		err = sqladmin.CheckNewRole(name)
	}
	if err != nil {
		return err
	}
	s, err := readSecret(c)
	if err != nil {
		return err
	}
	req := node.UserRequest{Name: name, Verifier: s.verifier, Database: c.String("db"), ReadOnly: c.Bool("read-only")}
	if _, err := perform(c, newProgress(), "user-create", req); err != nil {
		return err
	}
	return showSecret(c, req, s)
}

func changePassword(c *cli.Context) error {
	name, err := theName(c)
	if err == nil {
		err = sqladmin.CheckRole(name)
	}
	if err != nil {
		return err
	}
	s, err := readSecret(c)
	if err != nil {
		return err
	}
	req := node.UserRequest{Name: name, Verifier: s.verifier}
	if _, err := perform(c, newProgress(), "user-passwd", req); err != nil {
		return err
	}
	return showSecret(c, req, s)
}

// showSecret prints how to connect, with the password if it was generated.
func showSecret(c *cli.Context, u node.UserRequest, s secret) error {
	// The password must not be lost because the status cannot be had.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.Context), 15*time.Second)
	defer cancel()
	status, err := node.NewLocal(node.DefaultPaths()).Status(ctx)
	hosts := status.ReadWrite
	if u.ReadOnly {
		hosts = status.ReadOnly
	}
	dsn := connectionString(u.Name, u.Database, hosts)
	if c.Bool("json") {
		out := map[string]string{"user": u.Name, "url": dsn}
		if s.generated {
			out["password"] = s.password
		}
		return errors.Join(printJSON(os.Stdout, out), err)
	}
	if s.generated {
		fmt.Printf("\nThe password of %s, shown this once:\n\n    %s\n", u.Name, s.password)
	}
	if err != nil {
		return fmt.Errorf("user %s is ready, but where to connect cannot be told: %w", u.Name, err)
	}
	fmt.Printf("\nIts clients connect over TLS and check whom they speak to. They need the cluster's CA in a file\n"+
		"(pgha cert ca > pgha-ca.crt), and the password in PGPASSWORD or ~/.pgpass:\n\n    %s\n", dsn)
	return nil
}

// connectionString is what libpq and its like connect with, through the HAProxy
// of any data node.
func connectionString(user, database string, hosts []string) string {
	u := url.URL{
		Scheme: "postgresql", User: url.User(user), Host: strings.Join(hosts, ","), Path: "/" + firstOf(database, "DATABASE"),
		RawQuery: "sslmode=verify-full&sslrootcert=pgha-ca.crt",
	}
	return u.String()
}

func dropUser(c *cli.Context) error {
	name, err := theName(c)
	if err == nil {
		err = sqladmin.CheckRole(name)
	}
	if err != nil {
		return err
	}
	if err := confirm(c.Bool("yes"), fmt.Sprintf("This ends the sessions of the user %q and drops it with its privileges. Go on?", name)); err != nil {
		return err
	}
	if _, err := perform(c, newProgress(), "user-drop", node.UserRequest{Name: name}); err != nil || !c.Bool("json") {
		return err
	}
	return printJSON(os.Stdout, map[string]string{"dropped": name})
}

func listUsers(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	list, err := node.NewLocal(node.DefaultPaths()).Users(c.Context)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, list)
	}
	t := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "USER\tDATABASES\tSESSIONS\tLOGS IN BY\t")
	for _, u := range list {
		var notes []string
		for _, n := range []struct {
			text string
			is   bool
		}{{"superuser", u.Superuser}, {"read-only", u.ReadOnly}, {"pgha's own", u.Own}} {
			if n.is {
				notes = append(notes, n.text)
			}
		}
		by := "password"
		if !u.Password {
			by = "certificate"
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\n", u.Name, firstOf(strings.Join(u.Databases, ", "), "-"), u.Connections, by, strings.Join(notes, ", "))
	}
	if err := t.Flush(); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}
