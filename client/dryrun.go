package client

import (
	"context"
)

// Decision is what the policy would say to the caller.
type Decision struct {
	Action  string   `json:"action"`
	Org     string   `json:"orgId"`
	Subject string   `json:"subject"` // the caller as the server knows it
	Roles   []string `json:"roles"`
	Allow   bool     `json:"allow"`
	Reason  string   `json:"reason"`
	Scope   string   `json:"scope"`  // of what is allowed: organization or own
	Policy  string   `json:"policy"` // its revision
}

// AskPolicy asks what the policy would say if the caller did an action, such as
// orgkey.generate, in the organization. Nothing is done. A "no" is an answer and
// no error.
func (c *Client) AskPolicy(ctx context.Context, org, action string) (*Decision, error) {
	return get[Decision](ctx, c, orgPath(org, "decision", action))
}
