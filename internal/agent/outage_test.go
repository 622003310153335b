package agent

import (
	"fmt"
	"testing"
	"time"
)

// 10,000 agents lose their server at the same moment. However long it is away, it
// is not overrun when it is back, and none of them stays away for much longer.
// This uses what steer uses: relax while all is well, and then next after each
// failure. The server refuses at once, which is the worst for the spread.
func TestMassOutage(t *testing.T) {
	const agents = 10_000
	for _, tt := range []struct {
		within time.Duration // as KeepAlive said; 0: the server was polled
		outage time.Duration
		most   int // reconnects in any one second
		latest time.Duration
	}{
		{50 * time.Second, 100 * time.Millisecond, 280, 61 * time.Second},
		{50 * time.Second, 2 * time.Second, 280, 61 * time.Second},
		{50 * time.Second, 30 * time.Second, 420, 61 * time.Second},
		{50 * time.Second, 10 * time.Minute, 500, 61 * time.Second},
		{50 * time.Second, 8 * time.Hour, 500, 61 * time.Second},
		{25 * time.Second, 2 * time.Second, 500, 52 * time.Second},
		{25 * time.Second, 30 * time.Second, 500, 61 * time.Second},
		{25 * time.Second, 10 * time.Minute, 500, 61 * time.Second},
		{10 * time.Minute, 30 * time.Second, 50, 21 * time.Minute},
		{0, 30 * time.Second, 1000, 61 * time.Second},
		{0, 10 * time.Minute, 500, 61 * time.Second},
		{0, 8 * time.Hour, 500, 61 * time.Second},
	} {
		t.Run(fmt.Sprintf("within %s, away %s", tt.within, tt.outage), func(t *testing.T) {
			a := &Agent{cfg: Config{SyncInterval: 5 * time.Second}, failing: newRetry(), within: tt.within}
			perSecond := map[int]int{}
			most, tries := 0, 0
			var latest time.Duration
			for range agents {
				a.relax()
				at := a.failing.next() // the link is lost
				for ; at < tt.outage; tries++ {
					at += a.failing.next()
				}
				back := at - tt.outage
				second := int(back / time.Second)
				perSecond[second]++
				most, latest = max(most, perSecond[second]), max(latest, back)
			}
			t.Logf("at most %d reconnects in a second (%.1f %%), the last after %s; %.1f tries for each agent before", most, 100*float64(most)/agents, latest.Round(time.Second), float64(tries)/agents)
			if most > tt.most || latest > tt.latest {
				t.Errorf("want at most %d in a second and the last after %s", tt.most, tt.latest)
			}
		})
	}
}
