package authz

// ParseRole returns the role of exactly this name. ADMINISTRATORS is another
// name of ADMINISTRATOR.
func ParseRole(name string) (Role, bool) {
	switch role := Role(name); role {
	case Owner, Administrator, Workspaces, Billing, User:
		return role, true
	case "ADMINISTRATORS":
		return Administrator, true
	}
	return "", false
}

// RoleFromInteger returns the role that the platform means by n.
func RoleFromInteger(n int64) (Role, bool) {
	switch n {
	case 255:
		return Owner, true
	case 254:
		return Administrator, true
	case 2:
		return Workspaces, true
	case 1:
		return Billing, true
	case 0:
		return User, true
	}
	return "", false
}
