package cache

import (
	"bytes"
	"encoding/json"
	"testing"
)

// What was sealed opens to what it was, under its own name alone; anything else
// is refused and never panics.
func FuzzSeal(f *testing.F) {
	s, err := newSealer(make([]byte, keySize), td)
	if err != nil {
		f.Fatal(err)
	}
	good, err := s.seal("r/svid/1", []byte("a key"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add("r/svid/1", good)
	f.Add("r/svid/2", good)
	f.Add("", []byte{})
	f.Add(headerKey, []byte{sealVersion})
	f.Add(generationKey, append([]byte{sealVersion}, make([]byte, 28)...))
	f.Fuzz(func(t *testing.T, key string, raw []byte) {
		// Each process that fuzzes has a good one of its own, with another nonce.
		if plain, err := s.open(key, raw); err == nil && !(key == "r/svid/1" && string(plain) == "a key") {
			t.Fatalf("opened %q to %q", key, plain)
		}
		sealed, err := s.seal(key, raw)
		if err != nil {
			t.Fatal(err)
		}
		if plain, err := s.open(key, sealed); err != nil || !bytes.Equal(plain, raw) {
			t.Fatalf("opened to %q, %v", plain, err)
		}
		if _, err := s.open(key+"x", sealed); err == nil {
			t.Fatal("opened under another name")
		}
		sealed[len(sealed)-1] ^= 1
		if _, err := s.open(key, sealed); err == nil {
			t.Fatal("opened although a bit was changed")
		}
	})
}

func FuzzKeyFile(f *testing.F) {
	f.Add([]byte(`{"version":1,"key":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","generation":7}`))
	f.Add([]byte(`{"version":1,"key":"AAAA","generation":-1}`))
	f.Add([]byte(`{"version":1}{}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		key, err := parseKeyFile(raw)
		if err != nil {
			return
		}
		again, err := json.Marshal(keyFile{keyVersion, key.Data, key.Generation})
		if err != nil {
			t.Fatal(err)
		}
		got, err := parseKeyFile(again)
		if err != nil || !bytes.Equal(got.Data, key.Data) || got.Generation != key.Generation || len(got.Data) != keySize {
			t.Fatalf("%v, %v", got, err)
		}
	})
}
