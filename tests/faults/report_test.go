package faults

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// report is what docs/FAULTS.md says.
type report struct {
	order []string
	rows  map[string]*reportRow
}

type reportRow struct {
	fault         fault
	runs, failed  int
	moved, stayed int
	gaps          []time.Duration
}

func (p *report) add(f fault, res result, failed bool) {
	if p.rows == nil {
		p.rows = map[string]*reportRow{}
	}
	row := p.rows[f.name]
	if row == nil {
		row = &reportRow{fault: f}
		p.rows[f.name] = row
		p.order = append(p.order, f.name)
	}
	row.runs++
	switch {
	case failed:
		row.failed++
		return
	case res.moved:
		row.moved++
	default:
		row.stayed++
	}
	row.gaps = append(row.gaps, res.gap)
}

const reportHead = `# Faults

Written by ` + "`make soak`" + `: every fault that the tests know, done to a cluster of two
data nodes and a witness on one machine, with synchronous replication, while
clients write by way of HAProxy on both nodes and straight to both PostgreSQLs.
In every run no acknowledged write was lost, no two primaries acknowledged
writes, the registers were linearizable, and by packet capture the old primary's
port was shut before the new primary's first acknowledgement, unless it counts
as failed.

The gap is the longest time in which no client had a write acknowledged, from
the beginning of the fault until the cluster was whole again.

| fault | what happens | runs | failed | failovers | gap: min | median | max |
|---|---|--:|--:|--:|--:|--:|--:|
`

// text renders the report.
func (p *report) text() string {
	var b strings.Builder
	b.WriteString(reportHead)
	for _, name := range p.order {
		row := p.rows[name]
		low, middle, high := "–", "–", "–"
		if gaps := slices.Sorted(slices.Values(row.gaps)); len(gaps) > 0 {
			low, middle, high = seconds(gaps[0]), seconds(gaps[len(gaps)/2]), seconds(gaps[len(gaps)-1])
		}
		fmt.Fprintf(&b, "| %s | %s | %d | %d | %d | %s | %s | %s |\n", name, row.fault.what, row.runs, row.failed, row.moved, low, middle, high)
	}
	return b.String()
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }

// write writes docs/FAULTS.md, or where PGHA_FAULTS_REPORT says.
func (p *report) write() error {
	path := cmp.Or(os.Getenv("PGHA_FAULTS_REPORT"), "../../docs/FAULTS.md")
	if err := os.WriteFile(path, []byte(p.text()), 0o644); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}

func TestReport(t *testing.T) {
	var p report
	a, b := fault{name: "a", what: "A happens"}, fault{name: "b", what: "B happens"}
	for _, gap := range []time.Duration{3 * time.Second, time.Second, 2500 * time.Millisecond} {
		p.add(a, result{gap: gap, moved: true}, false)
	}
	p.add(a, result{}, true)
	p.add(b, result{}, true)
	want := "| a | A happens | 4 | 1 | 3 | 1.00 s | 2.50 s | 3.00 s |\n| b | B happens | 1 | 1 | 0 | – | – | – |\n"
	if got := p.text(); !strings.HasSuffix(got, "|\n"+want) {
		t.Errorf("report ends in\n%s\nwant\n%s", got[max(0, len(got)-len(want)-20):], want)
	}
}
