# Patroni runs this after it has taken the leader key and before it promotes
# PostgreSQL (its setting pre_promote). It asks the node's pgha daemon, which
# answers when the kernel has cut the old primary off; without that answer there
# is no promotion. Written by pgha; changes made here are overwritten.
import http.client
import socket
import sys


class Connection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(sys.argv[1])


try:
    c = Connection("pgha", timeout=float(sys.argv[2]))
    c.request("POST", "/v1/admit")
    answer = c.getresponse()
    if answer.status == 200:
        sys.exit(0)
    print("pgha: " + answer.read().decode(errors="replace").strip(), file=sys.stderr)
except OSError as e:
    print("pgha cannot be asked whether to promote: %s" % e, file=sys.stderr)
sys.exit(1)
