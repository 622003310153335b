package peercred

import "testing"

func TestCountPIDs(t *testing.T) {
	for in, want := range map[string]int{
		"Name:\tx\nNSpid:\t17\n":      1,
		"Name:\tx\nNSpid:\t17\t1\nX:": 2,
		"NSpid:\n":                    0,
	} {
		if n, err := countPIDs([]byte(in)); n != want || err != nil {
			t.Errorf("%q: %d, %v", in, n, err)
		}
	}
	for _, in := range []string{"", "Name:\tNSpid:\t1\n"} {
		if n, err := countPIDs([]byte(in)); err == nil {
			t.Errorf("%q: %d", in, n)
		}
	}
}
