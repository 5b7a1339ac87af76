package client

import (
	"context"
	"net/http"
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
	var body struct {
		Success bool      `json:"success"`
		Data    *Decision `json:"data"`
	}
	err := c.do(ctx, request{method: http.MethodGet, path: orgPath(org, "decision", action), token: true, read: func(a *answer) error {
		if err := a.decode(&body); err != nil {
			return err
		}
		if !body.Success || body.Data == nil {
			return a.foreign("JSON without data")
		}
		return nil
	}})
	return body.Data, err
}
