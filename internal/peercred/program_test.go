package peercred

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

func TestProgram(t *testing.T) {
	p := &Peer{PID: int32(os.Getpid())}
	got, err := p.program()
	if err != nil {
		t.Fatal(err)
	}
	if got.start == 0 || got.code == 0 || got.stack == 0 || got.dev == 0 || got.ino == 0 {
		t.Errorf("got %+v", got)
	}
	if again, err := p.program(); err != nil || again != got {
		t.Errorf("then %+v, %v", again, err)
	}
}

func stat(name, rest string) string { return "7 (" + name + ") S " + rest }

func TestParseStat(t *testing.T) {
	const fields = "4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 2200 23 24 25 2600 27 2800 29 30"
	for _, name := range []string{"web", "", ") S 1 2 3 (", "a b) c"} {
		if got, err := parseStat([]byte(stat(name, fields))); err != nil || got != (program{start: 2200, code: 2600, stack: 2800}) {
			t.Errorf("%q: got %+v, %v", name, got, err)
		}
	}
	for in, want := range map[string]string{
		"":                 "no name in brackets",
		"7 (web":           "no name in brackets",
		stat("web", "4 5"): "only 5 fields",
		stat("web", strings.TrimSuffix(fields, " 29 30")):        "only 28 fields",
		stat("web", strings.Replace(fields, "2200", "-1", 1)):    "field 22",
		stat("web", strings.Replace(fields, "2800", "0x123", 1)): "field 28",
	} {
		if got, err := parseStat([]byte(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("parseStat(%q) = %+v, %v; want %q", in, got, err, want)
		}
	}
}

func FuzzProgram(f *testing.F) {
	own, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(own)
	f.Add([]byte(stat(") R (", "4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29")))
	f.Fuzz(func(t *testing.T, line []byte) {
		p, err := parseStat(line)
		if err != nil {
			return
		}
		again := stat("x)", fmt.Sprintf("4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 %d 23 24 25 %d 27 %d 29", p.start, p.code, p.stack))
		if p2, err := parseStat([]byte(again)); err != nil || p2 != p {
			t.Errorf("%+v printed and parsed again is %+v, %v", p, p2, err)
		}
	})
}

func BenchmarkConfirm(b *testing.B) {
	p, err := FromPID(int32(os.Getpid()))
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	for b.Loop() {
		if err := p.Confirm(); err != nil {
			b.Fatal(err)
		}
	}
}
