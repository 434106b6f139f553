// Package host knows the machine: what is installed on it, what it has, who
// uses its ports, and whether pgha can work there.
//
// Everything but [InstallPackages] and [RemoveDropIn] only looks. Both leave
// the machine's own settings as they were: what they add are files of pgha's own.
package host
