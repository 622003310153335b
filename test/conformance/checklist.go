package conformance

// The checklist numbers the statements of each specification, in the order in
// which they stand there. Ours was made from their state at the revision below;
// a statement that moved or changed since keeps its number.
const revision = "665a28f (2026-07-01)"

// documents are the specifications by their short names, with how many statements
// there are of each. (FED: Federation, STB: Stability.)
var documents = map[string]int{
	"ID": 32, "X509": 42, "JWT": 30, "WIT": 42, "BND": 27, "FED": 51, "WEP": 27, "WAPI": 68, "BRE": 21, "BAPI": 45, "STB": 2,
}

// party is who a statement binds.
type party string

const (
	issuer    party = "ISS"
	agent     party = "AGT"
	publisher party = "PUB" // of bundles, as far as the issuer and the agent are
	broker    party = "BRS" // the server of the Broker API
	validator party = "VAL" // as far as the agent is, by ValidateJWTSVID
)

// bound are the statements that bind what we have. Who offers TLS, polls bundles
// or uses SVIDs is bound by others, which cannot be seen from these sockets.
var bound = []struct {
	document string
	party    party
	numbers  []int
}{
	{"ID", issuer, through(1, 10)},
	{"ID", issuer, through(12, 20)},
	{"ID", issuer, through(23, 31)},
	{"X509", issuer, []int{1, 3}},
	{"X509", issuer, through(5, 27)},
	{"X509", publisher, through(33, 38)},
	{"X509", publisher, []int{42}},
	{"JWT", issuer, []int{1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 14, 18, 19, 27, 28, 30}},
	{"JWT", validator, []int{5, 11, 15, 16, 17, 25}},
	{"JWT", publisher, through(22, 24)},
	{"WIT", issuer, []int{1, 2, 4, 5, 6, 8, 10, 11, 13, 14, 15, 17, 18, 20, 22, 23, 24, 25, 26, 27, 40, 42}},
	{"WIT", publisher, through(33, 35)},
	{"BND", publisher, through(1, 9)},
	{"BND", agent, []int{12, 17, 19}},
	{"BND", publisher, through(14, 16)},
	{"BND", issuer, []int{18}},
	{"BND", publisher, []int{21, 22, 24, 27}},
	{"FED", issuer, through(1, 4)},
	{"FED", agent, []int{11, 18, 45, 46}},
	{"WEP", agent, []int{1, 2, 3, 5, 6, 8, 9, 10, 15, 16, 17, 19, 20, 22, 23, 24, 25, 26}},
	{"WAPI", agent, []int{1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 15, 19, 20, 21, 23, 25, 26, 27, 28, 29, 30, 31}},
	{"WAPI", agent, []int{33, 34, 35, 36, 37, 39, 41, 42, 43, 44, 46, 47, 48, 50, 51}},
	{"WAPI", agent, []int{53, 54, 55, 56, 58, 61, 62, 63, 65, 66}},
	{"BRE", broker, []int{1, 2, 3, 5, 6, 7, 12, 15, 16, 17, 18, 19, 20}},
	{"BAPI", broker, []int{1, 2, 3, 4, 6, 8, 9, 10, 12, 13, 14, 15, 16, 17, 20, 21, 23, 24, 26, 27, 29, 31, 33, 34, 35, 38, 40, 41, 42, 43, 44}},
	{"STB", issuer, through(1, 2)},
}

func through(first, last int) (all []int) {
	for n := first; n <= last; n++ {
		all = append(all, n)
	}
	return all
}

// notApplicable are the statements that nothing here can break, and why.
var notApplicable = map[string]string{
	"ID-29":   "a permission to other documents",
	"JWT-30":  "the care is that of who asks: it names its audiences, and has none that it did not name",
	"WIT-17":  "a permission",
	"BND-21":  "no bundle map is written",
	"BND-22":  "no bundle map is written",
	"BND-24":  "no bundle map is written",
	"BND-27":  "the operator chooses server.refresh_hint",
	"FED-1":   "a permission",
	"WEP-6":   "there is no TCP endpoint, and no setting for one",
	"WAPI-2":  "a permission to operators that we give no means for: both profiles are always on",
	"WAPI-12": "advice on widespread updates over a network: these go to processes of the same host, one message for a change",
	"BAPI-3":  "a permission: there are no references of our own",
	"BAPI-14": "there are no references of our own",
	"BAPI-16": "a permission",
	"BAPI-17": "a permission that we give no means for: brokers are local",
	"BAPI-23": "binds those who read: what is sent is whole (BAPI-20)",
}

// notProved are the statements that hold for us and are not proved here, and why.
var notProved = map[string]string{
	"BAPI-4": "a process is pinned when the call begins; that a pid which is used again is not taken for it is tested below this API, in internal/peercred",
}

// runBy is where the rows that need an ability are run.
var runBy = map[Ability]string{
	Federation: "test/conformance", // no server takes foreign bundles yet
	Issuance:   "test/e2e",
	WIT:        "test/e2e",
	Brokerage:  "test/e2e",
}
