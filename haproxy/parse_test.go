package haproxy

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseStat(t *testing.T) {
	const csv = `# pxname,svname,qcur,scur,stot,bin,bout,econ,status,lastchg,type,check_status,check_code,check_duration,last_chk,addr,
fe_rw,FRONTEND,,1,2,3,4,,OPEN,,0,,,,,,
be_rw,n1,1,2,30,400,5000,6,UP,70,2,L7OK,200,12,,10.0.0.1:5442,
be_rw,n2,0,0,0,0,0,0,DOWN 1/2,8,2,* L6RSP,,3,"SSL handshake failure, or so",10.0.0.2:5442,
be_rw,BACKEND,0,2,30,400,5000,6,UP,70,1,,,,,,
`
	got, err := ParseStat([]byte(csv))
	must(t, err)
	want := []ServerStat{
		{Backend: "be_rw", Server: "n1", Status: "UP", Up: true, Addr: "10.0.0.1:5442", CheckStatus: "L7OK", CheckCode: 200,
			CheckDuration: 12 * time.Millisecond, LastChange: 70 * time.Second, Queue: 1, Sessions: 2, SessionsTotal: 30, BytesIn: 400, BytesOut: 5000, ConnectErrors: 6},
		{Backend: "be_rw", Server: "n2", Status: "DOWN 1/2", Addr: "10.0.0.2:5442", CheckStatus: "L6RSP",
			CheckDuration: 3 * time.Millisecond, CheckMessage: "SSL handshake failure, or so", LastChange: 8 * time.Second},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for what, bad := range map[string]string{"nothing": "", "other columns": "# a,b\n1,2\n", "an open quote": "# pxname,svname,status,type\n\"a\n", "a refusal": "Permission denied\n"} {
		if s, err := ParseStat([]byte(bad)); err == nil {
			t.Errorf("%s gives %v", what, s)
		}
	}
}

func TestParseProcesses(t *testing.T) {
	const answer = `#<PID>          <type>          <reloads>       <uptime>        <version>
1162            master          5 [failed: 1]   0d00h02m07s     3.0.11
# workers
1271            worker          0               0d00h00m00s     3.0.11
# old workers
1233            worker          3               0d00h00m43s     2.6.12
# programs
`
	got, err := parseProcesses(answer)
	must(t, err)
	want := processes{reloads: 5, failed: 1, workers: []Worker{{PID: 1271}, {PID: 1233, Old: true, Reloads: 3}}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(processes{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for _, bad := range []string{"", "Unknown command", strings.Replace(answer, "1162", "x", 1), strings.Replace(answer, "5 [", "x [", 1)} {
		if p, err := parseProcesses(bad); err == nil {
			t.Errorf("%q gives %+v", bad, p)
		}
	}
}
