package authn

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/internal/authz"
)

// Mapping says which claims of an issuer's tokens hold what.
//
// A claim that begins with a slash is a JSON pointer (RFC 6901) into the claims,
// as /realm_access/roles; any other is a claim's name as it is.
type Mapping struct {
	Subject      string // the claim with the caller's ID: a string
	Organization string // a string, a list of one string, or an object whose one name is meant and holds an object, as Keycloak writes it

	// Role is the claim with the caller's roles: a value or a list of values.
	// An object's names are its values, each of them only if it holds an object
	// that has the caller's organization as a name; Zitadel writes roles so. Of a claim
	// that is called scope or scp, a string is a list divided by spaces (RFC 8693, section 4.2).
	Role string

	// RoleMap says what the strings in the role claim mean. Strings that it does
	// not have are ignored. Without one, a role is its exact name or the platform's integer.
	RoleMap map[string]authz.Role

	// RoleDefault is the role of who has no other; empty: none.
	RoleDefault authz.Role
}

// DefaultMapping is that of tokens which name things as orgkeys does.
func DefaultMapping() Mapping {
	return Mapping{Subject: "sub", Organization: "org_id", Role: "org_role"}
}

func (m Mapping) check() error {
	names := []struct{ what, claim string }{{"subject", m.Subject}, {"organization", m.Organization}, {"role", m.Role}}
	for i, n := range names {
		if err := checkClaim(n.claim); err != nil {
			return fmt.Errorf("the claim of the %s: %w", n.what, err)
		}
		for _, other := range names[:i] {
			if n.claim == other.claim && !(other.what == "subject" && n.what == "role" && m.roleFromSubject()) {
				return fmt.Errorf("%s and %s have the same claim %q", other.what, n.what, n.claim)
			}
		}
		if err := m.checkRegistered(n.what, n.claim); err != nil {
			return err
		}
	}
	for value, role := range m.RoleMap {
		if value == "" {
			return errors.New("the role map has an empty value")
		}
		if canonical, ok := authz.ParseRole(string(role)); !ok || canonical != role {
			return fmt.Errorf("the role map maps %q to the unknown role %q", value, role)
		}
	}
	if canonical, ok := authz.ParseRole(string(m.RoleDefault)); m.RoleDefault != "" && (!ok || canonical != m.RoleDefault) {
		return fmt.Errorf("the default role %q is unknown", m.RoleDefault)
	}
	return nil
}

func checkClaim(claim string) error {
	if claim == "" {
		return errors.New("it has no name")
	}
	if strings.HasPrefix(claim, "/") && !jsontext.Pointer(claim).IsValid() {
		return fmt.Errorf("%q is not a JSON pointer (RFC 6901): ~ is written ~0, and / within a name ~1", claim)
	}
	return nil
}

// roleFromSubject reports whether roles are told by who the caller is, which
// needs a map that names them one by one.
func (m Mapping) roleFromSubject() bool {
	return firstName(m.Role) == "sub" && len(m.RoleMap) > 0
}

// checkRegistered refuses claims with a meaning of their own (RFC 7519, section
// 4.1; RFC 8693, section 4.1; RFC 7800): an organization read out of aud, say, would be one that callers share.
func (m Mapping) checkRegistered(what, claim string) error {
	switch name := firstName(claim); name {
	case "sub":
		if what == "subject" || what == "role" && m.roleFromSubject() {
			return nil
		}
	case "iss", "aud", "exp", "nbf", "iat", "jti", "act", "cnf":
	default:
		return nil
	}
	return fmt.Errorf("claim %q is a registered one and cannot hold the %s", claim, what)
}

// firstName is the name of the claim that a setting leads into.
func firstName(claim string) string {
	if !strings.HasPrefix(claim, "/") {
		return claim
	}
	for name := range jsontext.Pointer(claim).Tokens() {
		return name
	}
	return ""
}

// at returns the value that a claim's name or pointer leads to; nil if there is none.
func (c claimSet) at(claim string) jsontext.Value {
	if !strings.HasPrefix(claim, "/") {
		return c[claim]
	}
	var value jsontext.Value
	within := map[string]jsontext.Value(c)
	for name := range jsontext.Pointer(claim).Tokens() {
		if within == nil {
			within = members(value)
		}
		value, within = within[name], nil
		if value == nil {
			return nil
		}
	}
	return value
}

// members returns an object's members by name, a list's by index as JSON
// pointers write it, and nil of anything else.
func members(v jsontext.Value) map[string]jsontext.Value {
	var object map[string]jsontext.Value
	switch v.Kind() {
	case '{':
		if json.Unmarshal(v, &object) != nil {
			return nil
		}
	case '[':
		object = map[string]jsontext.Value{}
		for i, member := range list(v) {
			object[strconv.Itoa(i)] = member
		}
	}
	return object
}

// list returns the members of a list, and nil of anything else.
func list(v jsontext.Value) []jsontext.Value {
	var values []jsontext.Value
	if v.Kind() != '[' || json.Unmarshal(v, &values) != nil {
		return nil
	}
	return values
}

// organization reads the one organization that v names.
func organization(v jsontext.Value) (string, bool) {
	switch v.Kind() {
	case '"':
		return text(v)
	case '[':
		if values := list(v); len(values) == 1 {
			return text(values[0])
		}
	case '{':
		object := members(v)
		if len(object) != 1 {
			break
		}
		for name, about := range object {
			// Of {"id":"acme"}, the name would be everybody's organization; of {"id":null}, that of all who have none.
			return name, about.Kind() == '{'
		}
	}
	return "", false
}

// roles reads the roles in v that count for a caller of org, each once.
func (m Mapping) roles(v jsontext.Value, org string) []authz.Role {
	var roles []authz.Role
	for _, value := range m.roleValues(v, org) {
		if role, ok := m.role(value); ok && !slices.Contains(roles, role) {
			roles = append(roles, role)
		}
	}
	if roles == nil && m.RoleDefault != "" {
		roles = []authz.Role{m.RoleDefault}
	}
	return roles
}

// roleValues returns the values in v that may be roles: it, or its members.
func (m Mapping) roleValues(v jsontext.Value, org string) []jsontext.Value {
	var names []string
	scopes, isText := text(v)
	switch {
	case v.Kind() == '[':
		return list(v)
	case v.Kind() == '{':
		object := members(v)
		for _, name := range slices.Sorted(maps.Keys(object)) {
			where := object[name]
			if _, here := members(where)[org]; where.Kind() == '{' && here {
				names = append(names, name)
			}
		}
	case isText && m.rolesAreScopes():
		names = strings.Split(scopes, " ")
	default:
		return []jsontext.Value{v}
	}
	var values []jsontext.Value
	for _, name := range names {
		if quoted, err := json.Marshal(name); err == nil {
			values = append(values, quoted)
		}
	}
	return values
}

// rolesAreScopes reports whether the role claim is one whose strings are lists. Any other's
// are not divided: a group's name may hold a space and then another's.
func (m Mapping) rolesAreScopes() bool {
	name := m.Role
	if strings.HasPrefix(name, "/") {
		name = jsontext.Pointer(name).LastToken()
	}
	return name == "scope" || name == "scp"
}

// role reads a role by the map, or by its name or integer where there is none.
// The integer must be spelled as one: 254.0, 2.54e2 and -0 are numbers that
// other readers may take otherwise.
func (m Mapping) role(v jsontext.Value) (authz.Role, bool) {
	name, isText := text(v)
	switch {
	case isText && m.RoleMap != nil:
		role, ok := m.RoleMap[name]
		return role, ok
	case isText:
		return authz.ParseRole(name)
	case v.Kind() == '0' && m.RoleMap == nil:
		n, err := strconv.ParseUint(string(v), 10, 31)
		if err != nil {
			return "", false
		}
		return authz.RoleFromInteger(int64(n))
	}
	return "", false
}
