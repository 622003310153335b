package api

// Kind is what a caller is, as far as authorization asks. A caller can be
// several things at once.
type Kind uint8

// The kinds of caller.
const (
	Anyone     Kind = 1 << iota // whoever reaches the port, with or without an SVID
	Local                       // came by the admin socket
	Admin                       // has an SVID that is configured or registered as admin
	Agent                       // has the SVID that an attested node may use now
	Downstream                  // has an SVID that is registered as downstream
)

const operator = Local | Admin

// rules is who may call what, for every service there is. What is not in it is
// refused, and a test walks the registered services.
var rules = flatten(map[string]map[string]Kind{
	"spire.api.server.agent.v1.Agent": {
		"AttestAgent":     Anyone,
		"RenewAgent":      Agent,
		"PostStatus":      Agent,
		"CountAgents":     operator,
		"ListAgents":      operator,
		"GetAgent":        operator,
		"DeleteAgent":     operator,
		"BanAgent":        operator,
		"CreateJoinToken": operator,
	},
	"spire.api.server.bundle.v1.Bundle": {
		"GetBundle":                  Anyone,
		"GetFederatedBundle":         operator | Agent,
		"CountBundles":               operator,
		"AppendBundle":               operator,
		"ListFederatedBundles":       operator,
		"BatchCreateFederatedBundle": operator,
		"BatchUpdateFederatedBundle": operator,
		"BatchSetFederatedBundle":    operator,
		"BatchDeleteFederatedBundle": operator,
		"PublishJWTAuthority":        Downstream,
		"PublishWITAuthority":        Downstream,
	},
	"spire.api.server.entry.v1.Entry": {
		"GetAuthorizedEntries":  Agent,
		"SyncAuthorizedEntries": Agent,
		"CountEntries":          operator,
		"ListEntries":           operator,
		"GetEntry":              operator,
		"BatchCreateEntry":      operator,
		"BatchUpdateEntry":      operator,
		"BatchDeleteEntry":      operator,
	},
	"spire.api.server.svid.v1.SVID": {
		"BatchNewX509SVID":    Agent,
		"NewJWTSVID":          Agent,
		"BatchNewWITSVID":     Agent,
		"MintX509SVID":        operator,
		"MintJWTSVID":         operator,
		"MintWITSVID":         operator,
		"NewDownstreamX509CA": Downstream,
	},
	"spiffed.sync.v1.Sync": {
		"Follow": Agent,
	},
	"spire.api.server.debug.v1.Debug": {
		"GetInfo": Local,
	},
	"spire.api.server.logger.v1.Logger": {
		"GetLogger":     Local,
		"SetLogLevel":   Local,
		"ResetLogLevel": Local,
	},
	"grpc.health.v1.Health": {
		"Check": Local,
		"List":  Local,
		"Watch": Local,
	},
	"spiffed.admin.v1.Server": {
		"CreateJoinToken": Local,
		"ListJoinTokens":  Local,
		"RevokeJoinToken": Local,
		"GetStatus":       Local,
		"ListNodes":       Local,
	},
})

// flatten makes the keys what gRPC calls a full method name.
func flatten(services map[string]map[string]Kind) map[string]Kind {
	flat := map[string]Kind{}
	for service, methods := range services {
		for method, kinds := range methods {
			flat["/"+service+"/"+method] = kinds
		}
	}
	return flat
}
