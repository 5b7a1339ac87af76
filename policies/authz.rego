# The only place in orgkeys where a role or an organization is compared.
#
# The input is a caller, an action, and the organization the action is about:
#
#	{"caller": {"kind", "subject", "org", "roles"}, "action", "org"}
#
# Roles arrive by their canonical names, any of which may match. The answer is
# always data.orgkeys.authz.decision: {"allow", "reason", "scope"}, where the
# scope of a denied request is "". Conditions are stated positively throughout:
# what is missing or of the wrong type makes a condition undefined, and an
# undefined condition only ever leads to a "no".
package orgkeys.authz

# What each role may do, and on how much of its organization: all of it, or
# only what the caller did. One constant object, since it is what every decision
# looks into.
grants := {
	"orgkey.generate": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"orgkey.list": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"orgkey.delete": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"orgkey.delete_all": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"orgkey.fetch_sealed": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"orgkey.add": {}, # nobody, unless a policy of your own says so
	"device.list": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"device.allow": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"device.remove": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"enrollment.create": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"enrollment.list": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"enrollment.approve": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"enrollment.revoke": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"node.list": {"OWNER": "organization", "ADMINISTRATOR": "organization", "WORKSPACES": "organization", "BILLING": "organization", "USER": "organization"},
	"node.delete": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"secret.put": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"secret.list": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"secret.delete": {"OWNER": "organization", "ADMINISTRATOR": "organization"},
	"event.read": {"OWNER": "organization", "ADMINISTRATOR": "organization", "WORKSPACES": "own", "BILLING": "own", "USER": "own"},
	"event.mark": {"OWNER": "organization", "ADMINISTRATOR": "organization", "WORKSPACES": "own", "BILLING": "own", "USER": "own"},
	"policy.ask": {"OWNER": "organization", "ADMINISTRATOR": "organization", "WORKSPACES": "organization", "BILLING": "organization", "USER": "organization"},
}

# Nobody else may do these, and nodes may do nothing else.
for_nodes := {"node.register", "node.unregister", "secret.fetch"}

# Nor these, which are for who has an enrollment's token, or the key that it gave.
for_enrollments := {"enrollment.claim", "enrollment.receive"}

default decision := {"allow": false, "reason": "malformed_request", "scope": ""}

# A caller hears about roles only in its own organization, so that another one's
# rules and objects stay unknown. The widest scope that any role grants comes first;
# a node has no roles, and may do what is for nodes.
decision := {"allow": true, "reason": "allowed", "scope": "organization"} if {
	well_formed
	input.caller.org == input.org
	grants[input.action][input.caller.roles[_]] == "organization"
} else := {"allow": true, "reason": "allowed", "scope": "own"} if {
	well_formed
	input.caller.org == input.org
	grants[input.action][input.caller.roles[_]] == "own"
} else := {"allow": true, "reason": "allowed", "scope": "organization"} if {
	well_formed
	input.caller.org == input.org
	input.caller.kind == "node"
	for_nodes[input.action]
} else := {"allow": true, "reason": "allowed", "scope": "organization"} if {
	well_formed
	input.caller.org == input.org
	input.caller.kind == "enrollment"
	for_enrollments[input.action]
} else := {"allow": false, "reason": "insufficient_role", "scope": ""} if {
	well_formed
	known_action
	input.caller.org == input.org
} else := {"allow": false, "reason": "other_organization", "scope": ""} if {
	well_formed
	known_action
} else := {"allow": false, "reason": "unknown_action", "scope": ""} if {
	well_formed
}

without_roles := {"node", "enrollment"}

known_action if grants[input.action]

known_action if for_nodes[input.action]

known_action if for_enrollments[input.action]

# Every text is a string, and none is empty: two empty strings are equal, so one
# must not get as far as a comparison. Two comparisons suffice for all of them,
# since values of different types have an order: null, booleans and numbers come
# before every string, arrays and objects behind.
well_formed if {
	input.caller.kind == "user"
	is_array(input.caller.roles)
	texts := array.concat([input.action, input.org, input.caller.org, input.caller.subject], input.caller.roles)
	min(texts) > ""
	is_string(max(texts))
}

# Roles are granted to people; a node or an enrollment that comes with one is a mistake.
well_formed if {
	without_roles[input.caller.kind]
	input.caller.roles == []
	texts := [input.action, input.org, input.caller.org, input.caller.subject]
	min(texts) > ""
	is_string(max(texts))
}
