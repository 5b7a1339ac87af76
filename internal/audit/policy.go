package audit

// PolicyFile is one file of a policy.
type PolicyFile struct {
	Revision string
	Name     string
	Content  []byte
}
