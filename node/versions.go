package node

import (
	"cmp"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"pgha/cluster"
)

// A version is one of a release, as v1.2.3 or v1.2.3-rc1, with how many commits
// came after it where git describes it so.
var versionRE = regexp.MustCompile(`^v?(\d+)\.(\d+)\.(\d+)(?:-rc\.?(\d+))?(?:-(\d+)-g[0-9a-f]+)?(?:-dirty)?$`)

// compareVersions says whether a is older than, the same as or newer than b: -1, 0
// or 1. ok is false where that cannot be told.
func compareVersions(a, b string) (order int, ok bool) {
	if a == b {
		return 0, true
	}
	x, y := versionRE.FindStringSubmatch(a), versionRE.FindStringSubmatch(b)
	if x == nil || y == nil {
		return 0, false
	}
	for i := 1; i < len(x); i++ {
		m, n := versionPart(x[i], i), versionPart(y[i], i)
		if c := cmp.Compare(m, n); c != 0 {
			return c, true
		}
	}
	return 0, false // of the same release, and yet not the same
}

// versionPart is a part of a version as a number. Without a fourth one it is the
// release, which comes after its candidates.
func versionPart(s string, i int) int {
	if s == "" && i == 4 {
		return 1 << 30
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		return 0
	}
	return n
}

// VersionsText says which node runs which version of pgha, as "n1, witness: v1.0.0;
// n2: v1.1.0".
func VersionsText(members []MemberStatus) string {
	var order []string
	nodes := map[string][]string{}
	for _, m := range members {
		if m.Version == "" {
			continue
		}
		if nodes[m.Version] == nil {
			order = append(order, m.Version)
		}
		nodes[m.Version] = append(nodes[m.Version], m.Name)
	}
	var out []string
	for _, v := range order {
		out = append(out, strings.Join(nodes[v], ", ")+": "+v)
	}
	return strings.Join(out, "; ")
}

// mixedVersions says what to do where not all nodes run the same version: nothing
// is wrong with that while an upgrade is under way, and it is no state to stay in.
func mixedVersions(members []MemberStatus) []string {
	var newest MemberStatus
	mixed, told := false, true
	for _, m := range members {
		if m.Version == "" {
			continue
		}
		switch order, ok := compareVersions(m.Version, newest.Version); {
		case newest.Version == "":
			newest = m
		case !ok:
			mixed, told = true, false
		case order != 0:
			mixed = true
			if order > 0 {
				newest = m
			}
		case newest.Role != cluster.RoleData: // where the command can be run
			newest = m
		}
	}
	if !mixed {
		return nil
	}
	where := newest.Name
	if !told || newest.Role != cluster.RoleData {
		where = "a data node with the newer one"
	}
	out := []string{fmt.Sprintf("different versions of pgha run (%s): finish it with pgha upgrade on %s", VersionsText(members), where)}
	for _, m := range members {
		if u := m.Upgrade; u != nil && u.Failed != "" {
			out = append(out, fmt.Sprintf("%s runs %s again, as %s has failed there: %s", m.Name, m.Version, u.Version, u.Failed))
		}
	}
	return out
}
