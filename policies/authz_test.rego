# The decision table, data.decisions, against the policy.
package orgkeys.authz_test

import data.orgkeys.authz

scopes := {"organization", "own"}

# An answer in the table is the scope of what is allowed, or the reason why not.
expected(answer) := {"allow": true, "reason": "allowed", "scope": answer} if answer in scopes

expected(answer) := {"allow": false, "reason": answer, "scope": ""} if not answer in scopes

cases contains {"name": name, "input": request, "answer": row.answers[i]} if {
	some row in data.decisions.rows
	some i, caller in data.decisions.callers
	organization := data.decisions.organizations[row.organization]
	name := sprintf("%s, %s organization, %s", [row.action, row.organization, caller.name])
	request := {
		"caller": {
			"kind": caller.kind,
			"subject": "u-1",
			"org": organization.caller,
			"roles": caller.roles,
		},
		"action": row.action,
		"org": organization.request,
	}
}

wrong contains name if {
	some {"name": name, "input": request, "answer": answer} in cases
	not authz.decision == expected(answer) with input as request
}

test_every_answer_of_the_table if {
	count(cases) > 0
	count(cases) == count(data.decisions.rows) * count(data.decisions.callers)
	count(wrong) == 0
}

test_every_row_answers_for_every_caller if {
	every row in data.decisions.rows {
		count(row.answers) == count(data.decisions.callers)
	}
}

test_every_action_of_the_policy_is_in_the_table if {
	actions := (object.keys(authz.grants) | authz.for_nodes) | authz.for_enrollments
	count(actions) > 0
	every action in actions {
		every organization in ["own", "another"] {
			some row in data.decisions.rows
			row.action == action
			row.organization == organization
		}
	}
}

test_malformed_requests_are_denied if {
	count(data.decisions.malformed) > 0
	every request in data.decisions.malformed {
		authz.decision == expected("malformed_request") with input as request.input
	}
}

test_a_request_without_input_is_denied if {
	authz.decision == expected("malformed_request")
}
