package patroni

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

var hbaName = regexp.MustCompile(`^\+?[A-Za-z0-9_][A-Za-z0-9_.$-]*$`)

// ParseHBARule checks a line that an operator wants in pg_hba.conf and returns it
// with single spaces:
//
//	hostssl DATABASE[,DATABASE...] USER[,USER...] ADDRESS METHOD [clientcert=verify-full|verify-ca]
//
// It is stricter than PostgreSQL: a line that PostgreSQL does not understand keeps
// the whole file from being loaded, and one without TLS or without a real proof of
// identity has no place in the cluster.
func ParseHBARule(line string) (string, error) {
	f := strings.Fields(line)
	bad := func(format string, args ...any) (string, error) {
		return "", fmt.Errorf("hba rule %q: %s", strings.Join(f, " "), fmt.Sprintf(format, args...))
	}
	if len(f) == 0 {
		return bad("it is empty: write it as hostssl DATABASE USER ADDRESS METHOD")
	}
	if f[0] != "hostssl" {
		return bad("it begins with %q: only hostssl is possible, because clients always use TLS and the unix socket is pgha's own", f[0])
	}
	if len(f) < 5 {
		return bad("it has %d fields: write it as hostssl DATABASE USER ADDRESS METHOD", len(f))
	}
	if err := hbaNames("database", f[1]); err != nil {
		return bad("%s", err)
	}
	if err := hbaNames("user", f[2]); err != nil {
		return bad("%s", err)
	}
	if slices.Contains(strings.Split(f[1], ","), "replication") {
		return bad("replication is pgha's own")
	}
	for name := range strings.SplitSeq(f[2], ",") {
		if slices.Contains([]string{Superuser, ReplicationUser, RewindUser}, name) {
			return bad("the role %s logs in as pgha has it, by certificate; it needs no rule", name)
		}
	}
	if err := hbaAddress(f[3]); err != nil {
		return bad("%s", err)
	}
	switch method := f[4]; method {
	case "scram-sha-256", "cert", "reject":
	case "trust":
		return bad("trust would let anybody in without a proof of who it is: use scram-sha-256, cert or reject")
	case "md5", "password":
		return bad("%s is a weaker password login: use scram-sha-256", method)
	default:
		if _, err := netip.ParseAddr(method); err == nil {
			return bad("write the network in one field, as 10.0.0.0/16")
		}
		return bad("there is no method %q here: use scram-sha-256, cert or reject", method)
	}
	for _, o := range f[5:] {
		if o != "clientcert=verify-full" && o != "clientcert=verify-ca" || f[4] == "reject" {
			return bad("the option %q is not possible: use clientcert=verify-full or clientcert=verify-ca, or none", o)
		}
	}
	return strings.Join(f, " "), nil
}

func hbaNames(what, list string) error {
	for name := range strings.SplitSeq(list, ",") {
		switch {
		case name == "":
			return fmt.Errorf("a %s is missing: write several as a,b without spaces", what)
		case !hbaName.MatchString(name):
			return fmt.Errorf("%s %q is not possible: write all, or names of letters, digits, '_', '.', '$' and '-'", what, name)
		}
	}
	return nil
}

func hbaAddress(s string) error {
	if s == "all" || s == "samenet" || s == "samehost" {
		return nil
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return fmt.Errorf("address %q is no network: write all, or a network as 10.0.0.0/16", s)
	case p != p.Masked():
		return fmt.Errorf("address %s is not a network: did you mean %s", p, p.Masked())
	case p.Addr().Is4In6():
		return errors.New("write the IPv4 network as IPv4")
	}
	return nil
}
