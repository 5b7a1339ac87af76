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

managers := {"OWNER", "ADMINISTRATOR"}

members := {"OWNER", "ADMINISTRATOR", "WORKSPACES", "BILLING", "USER"}

for_managers := {
	"orgkey.generate",
	"orgkey.list",
	"orgkey.delete",
	"orgkey.delete_all",
	"node.delete",
	"secret.put",
	"secret.list",
	"secret.delete",
	"event.read",
}

for_members := {"node.list"}

# Of these, members who are not managers see what they did themselves.
own_for_members := {"event.read"}

# Nobody else may do these, and nodes may do nothing else.
for_nodes := {"node.register", "node.unregister", "secret.fetch"}

default decision := {"allow": false, "reason": "malformed_request", "scope": ""}

# A caller hears about roles only in its own organization, so that another one's
# rules and objects stay unknown.
decision := {"allow": true, "reason": "allowed", "scope": scope} if {
	well_formed
	own_organization
} else := {"allow": false, "reason": "insufficient_role", "scope": ""} if {
	well_formed
	known_action
	own_organization
} else := {"allow": false, "reason": "other_organization", "scope": ""} if {
	well_formed
	known_action
} else := {"allow": false, "reason": "unknown_action", "scope": ""} if {
	well_formed
}

# How much of the organization the caller may act on; undefined is nothing.
scope := "organization" if {
	input.caller.kind == "node"
	input.action in for_nodes
} else := "organization" if {
	input.caller.kind == "user"
	input.action in for_managers
	some role in input.caller.roles
	role in managers
} else := "organization" if {
	input.caller.kind == "user"
	input.action in for_members
	some role in input.caller.roles
	role in members
} else := "own" if {
	input.caller.kind == "user"
	input.action in own_for_members
	some role in input.caller.roles
	role in members
}

own_organization if input.caller.org == input.org

known_action if input.action in for_managers

known_action if input.action in for_members

known_action if input.action in for_nodes

# Two empty strings are equal, so an empty one must not get as far as a comparison.
well_formed if {
	is_string(input.action)
	is_string(input.org)
	is_string(input.caller.org)
	is_string(input.caller.subject)
	not "" in {input.action, input.org, input.caller.org, input.caller.subject}
	known_kind
}

known_kind if {
	input.caller.kind == "user"
	is_array(input.caller.roles)
	every role in input.caller.roles { is_string(role) }
}

# Roles are granted to people; a node that comes with one is a mistake.
known_kind if {
	input.caller.kind == "node"
	input.caller.roles == []
}
