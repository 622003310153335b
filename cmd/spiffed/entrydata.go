package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	entryext "github.com/spiffed/spiffed/internal/api/spiffed/entry/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

// maxEntryData and maxEntries bound what --data reads.
const maxEntryData, maxEntries = 16 << 20, 20000

// entryJSON is an entry as --output json shows it. --data reads it back.
type entryJSON struct {
	ID              string         `json:"id"`
	SPIFFEID        string         `json:"spiffe_id"`
	ParentID        string         `json:"parent_id"`
	Selectors       []selectorJSON `json:"selectors"`
	X509SVIDTTL     int32          `json:"x509_svid_ttl,omitempty"` // seconds
	JWTSVIDTTL      int32          `json:"jwt_svid_ttl,omitempty"`
	FederatesWith   []string       `json:"federates_with,omitempty"`
	DNSNames        []string       `json:"dns_names,omitempty"`
	Hint            string         `json:"hint,omitempty"`
	Order           int32          `json:"order,omitempty"`
	Admin           bool           `json:"admin,omitempty"`
	Downstream      bool           `json:"downstream,omitempty"`
	StoreSVID       bool           `json:"store_svid,omitempty"`
	DisablePrefetch bool           `json:"disable_x509_svid_prefetch,omitempty"`
	IncludeJTI      bool           `json:"jwt_svid_include_jti,omitempty"`
	ExpiresAt       time.Time      `json:"expires_at,omitzero"`
	CreatedAt       time.Time      `json:"created_at,omitzero"`
	RevisionNumber  int64          `json:"revision_number"`
}

type selectorJSON struct {
	Type  string `json:"type"`
	Value string `json:"value"`
}

func fromProtoEntry(e *types.Entry) entryJSON {
	out := entryJSON{
		ID: e.GetId(), SPIFFEID: fromProtoID(e.GetSpiffeId()), ParentID: fromProtoID(e.GetParentId()),
		Selectors:   []selectorJSON{},
		X509SVIDTTL: e.GetX509SvidTtl(), JWTSVIDTTL: e.GetJwtSvidTtl(),
		FederatesWith: e.GetFederatesWith(), DNSNames: e.GetDnsNames(), Hint: e.GetHint(),
		Admin: e.GetAdmin(), Downstream: e.GetDownstream(), StoreSVID: e.GetStoreSvid(),
		DisablePrefetch: e.GetAdditionalAttributes().GetDisableX509SvidPrefetch(),
		IncludeJTI:      e.GetAdditionalAttributes().GetJwtSvidIncludeJti(),
		ExpiresAt:       unixTime(e.GetExpiresAt()), CreatedAt: unixTime(e.GetCreatedAt()),
		RevisionNumber: e.GetRevisionNumber(),
	}
	out.Order, _ = entryext.Order(e)
	for _, s := range e.GetSelectors() {
		out.Selectors = append(out.Selectors, selectorJSON{s.Type, s.Value})
	}
	return out
}

// entryData is an entry as --data may have it: as we print it, in the form that
// SPIRE's command line reads, and in the form that it prints. Where a key has
// two names, one is enough.
type entryData struct {
	ID              string         `json:"id"`
	EntryID         string         `json:"entry_id"`
	SPIFFEID        idData         `json:"spiffe_id"`
	ParentID        idData         `json:"parent_id"`
	Selectors       []selectorData `json:"selectors"`
	TTL             secondsData    `json:"ttl"` // SPIRE before 1.5
	X509SVIDTTL     secondsData    `json:"x509_svid_ttl"`
	JWTSVIDTTL      secondsData    `json:"jwt_svid_ttl"`
	FederatesWith   []string       `json:"federates_with"`
	DNSNames        []string       `json:"dns_names"`
	Hint            string         `json:"hint"`
	Order           int32          `json:"order"`
	Admin           bool           `json:"admin"`
	Downstream      bool           `json:"downstream"`
	StoreSVID       bool           `json:"store_svid"`
	DisablePrefetch bool           `json:"disable_x509_svid_prefetch"`
	IncludeJTI      bool           `json:"jwt_svid_include_jti"`
	Additional      additionalData `json:"additional_attributes"`
	ExpiresAt       timeData       `json:"expires_at"`
	EntryExpiry     timeData       `json:"entryExpiry"`

	// What the server sets is read, so that what was printed can be used
	// again, and ignored.
	CreatedAt      any `json:"created_at"`
	RevisionNumber any `json:"revision_number"`
}

type additionalData struct {
	DisablePrefetch bool `json:"disable_x509_svid_prefetch"`
	IncludeJTI      bool `json:"jwt_svid_include_jti"`
}

// idData is a SPIFFE ID, a bare path, or an object of trust domain and path.
type idData string

func (d *idData) UnmarshalJSON(data []byte) error {
	var object struct {
		TrustDomain string `json:"trust_domain"`
		Path        string `json:"path"`
	}
	if bytes.HasPrefix(data, []byte("{")) {
		if err := unmarshalStrict(data, &object); err != nil {
			return err
		}
		*d = idData("spiffe://" + object.TrustDomain + object.Path)
		return nil
	}
	return json.Unmarshal(data, (*string)(d))
}

// selectorData is "type:value" or an object of the two.
type selectorData registry.Selector

func (d *selectorData) UnmarshalJSON(data []byte) error {
	if bytes.HasPrefix(data, []byte("{")) {
		var object selectorJSON
		if err := unmarshalStrict(data, &object); err != nil {
			return err
		}
		s := registry.Selector{Type: object.Type, Value: object.Value}
		*d = selectorData(s)
		return s.Validate()
	}
	var text string
	if err := json.Unmarshal(data, &text); err != nil {
		return err
	}
	s, err := registry.ParseSelector(text)
	*d = selectorData(s)
	return err
}

// secondsData is a number of seconds, or a duration as a string.
type secondsData int32

func (d *secondsData) UnmarshalJSON(data []byte) error {
	text := strings.Trim(string(data), `"`)
	v, err := parseDuration(text)
	*d = secondsData(v / time.Second)
	return err
}

// timeData is a time in RFC 3339, or seconds since 1970.
type timeData int64

func (d *timeData) UnmarshalJSON(data []byte) error {
	text := strings.Trim(string(data), `"`)
	if n, err := strconv.ParseInt(text, 10, 64); err == nil && n >= 0 {
		*d = timeData(n)
		return nil
	}
	t, err := time.Parse(time.RFC3339, text)
	if err != nil || t.Unix() < 0 {
		return fmt.Errorf("%s is neither a time such as \"2027-01-31T12:00:00Z\" nor seconds since 1970", data)
	}
	*d = timeData(t.Unix())
	return nil
}

// unmarshalStrict refuses keys that there are not: a mistyped one would be
// ignored, and an entry be wider than it was meant.
func unmarshalStrict(data []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return errors.New(strings.TrimPrefix(err.Error(), "json: "))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the end of the JSON value")
	}
	return nil
}

// parsedEntry is an entry of --data. The IDs may be bare paths still.
type parsedEntry struct {
	entry            *types.Entry
	spiffeID, parent string
}

// parseEntryData reads {"entries": [...]}.
func parseEntryData(data []byte) ([]parsedEntry, error) {
	var doc struct {
		Entries []json.RawMessage `json:"entries"`
	}
	if err := unmarshalStrict(data, &doc); err != nil {
		return nil, err
	}
	if len(doc.Entries) == 0 {
		return nil, errors.New(`no entries; want {"entries": [...]}`)
	}
	if n := len(doc.Entries); n > maxEntries {
		return nil, fmt.Errorf("%d entries, at most %d are read at once", n, maxEntries)
	}
	out := make([]parsedEntry, 0, len(doc.Entries))
	for i, raw := range doc.Entries {
		p, err := parseEntry(raw)
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", i+1, err)
		}
		out = append(out, p)
	}
	return out, nil
}

func parseEntry(raw []byte) (parsedEntry, error) {
	var none parsedEntry
	var d entryData
	if err := unmarshalStrict(raw, &d); err != nil {
		return none, err
	}
	if d.ID != "" && d.EntryID != "" && d.ID != d.EntryID {
		return none, fmt.Errorf("id %q and entry_id %q differ", d.ID, d.EntryID)
	}
	if d.TTL != 0 && d.X509SVIDTTL != 0 && d.TTL != d.X509SVIDTTL {
		return none, errors.New("ttl and x509_svid_ttl differ")
	}
	if d.ExpiresAt != 0 && d.EntryExpiry != 0 && d.ExpiresAt != d.EntryExpiry {
		return none, errors.New("expires_at and entryExpiry differ")
	}
	for key, id := range map[string]idData{"spiffe_id": d.SPIFFEID, "parent_id": d.ParentID} {
		if id == "" {
			return none, fmt.Errorf("%s is missing", key)
		}
		if err := checkID(key, string(id)); err != nil {
			return none, err
		}
	}
	e := &types.Entry{
		Id:          cmp.Or(d.ID, d.EntryID),
		X509SvidTtl: int32(max(d.X509SVIDTTL, d.TTL)), JwtSvidTtl: int32(d.JWTSVIDTTL),
		DnsNames: d.DNSNames, Hint: d.Hint,
		Admin: d.Admin, Downstream: d.Downstream, StoreSvid: d.StoreSVID,
		ExpiresAt: int64(max(d.ExpiresAt, d.EntryExpiry)),
	}
	if prefetch, jti := d.DisablePrefetch || d.Additional.DisablePrefetch, d.IncludeJTI || d.Additional.IncludeJTI; prefetch || jti {
		e.AdditionalAttributes = &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: prefetch, JwtSvidIncludeJti: jti}
	}
	entryext.SetOrder(e, d.Order) // 0 as well: it is the whole entry
	for _, s := range d.Selectors {
		e.Selectors = append(e.Selectors, &types.Selector{Type: s.Type, Value: s.Value})
	}
	var err error
	if e.FederatesWith, err = trustDomains(d.FederatesWith); err != nil {
		return none, fmt.Errorf("federates_with: %w", err)
	}
	return parsedEntry{e, string(d.SPIFFEID), string(d.ParentID)}, nil
}

// trustDomains reads names of trust domains, or their SPIFFE IDs.
func trustDomains(names []string) ([]string, error) {
	var out []string
	for _, name := range names {
		td, err := registry.ParseTrustDomain(name)
		if err != nil {
			return nil, err
		}
		out = append(out, td.Name())
	}
	return out, nil
}
