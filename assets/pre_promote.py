# Patroni runs this after it has taken the leader key and before it promotes
# PostgreSQL (its setting pre_promote). It asks the node's pgha daemon, which
# answers when the kernel has cut the old primary off; without that answer there
# is no promotion. Written by pgha; changes made here are overwritten.
import http.client
import socket
import sys
import time

# An answer is good for a moment only: whoever was stopped since it was given
# asks again.
FRESH = 2.0


class Connection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(sys.argv[1])


why = "pgha was not asked"
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    asked = time.monotonic()
    try:
        c = Connection("pgha", timeout=FRESH)
        c.request("POST", "/v1/admit")
        answer = c.getresponse()
        body = answer.read().decode(errors="replace").strip()
        if answer.status == 200 and time.monotonic() - asked < FRESH:
            sys.exit(0)
        why = "pgha: " + body
    except (OSError, http.client.HTTPException) as e:
        why = "pgha cannot be asked whether to promote: %s" % e
        time.sleep(0.2)
print(why, file=sys.stderr)
sys.exit(1)
