package main

import "testing"

// WIT-42: the switch in the file is the only one, and off is the default.
func TestServerSignsWIT(t *testing.T) {
	const server = `
[server]
trust_domain = "example.org"
listen = "127.0.0.1:0"
advertise = ["127.0.0.1:1"]
data_dir = "%s/server"
admin_socket = "%s/admin.sock"
`
	for text, want := range map[string]bool{
		server: false,
		server + "[server.experimental]\nwit_svid = true\n":  true,
		server + "[server.experimental]\nwit_svid = false\n": false,
	} {
		h := testHost(t, text)
		if n := len(h.ca.Bundle().WITAuthorities); h.ca.SignsWIT() != want || (n == 1) != want {
			t.Errorf("signs WIT-SVIDs: %t, with %d authorities; want %t", h.ca.SignsWIT(), n, want)
		}
		h.close()
	}
}
