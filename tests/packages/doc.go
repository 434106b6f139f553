// Command packages installs the Debian packages that it is given, where they are
// missing, the way pgha itself does: no PostgreSQL cluster is made and none of
// the services that would compete with the tests is started. It needs root only
// if there is something to install.
package main
