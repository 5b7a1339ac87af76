package client

import (
	"context"
	"net/http"
	"time"

	"github.com/go-json-experiment/json"
)

// Device is a TPM that may have keys of an organization, or their recipients.
type Device struct {
	EK      string    `json:"ek"` // "sha256-" and lower-case hex of SHA-256 over the endorsement key's SubjectPublicKeyInfo
	Org     string    `json:"orgId"`
	Note    string    `json:"note,omitempty"`
	Created time.Time `json:"createdAt"`
}

// AllowDevice allows a TPM, or changes its note. Repeating it is harmless.
func (c *Client) AllowDevice(ctx context.Context, org, ek, note string) error {
	return c.do(ctx, request{
		method: http.MethodPut, path: orgPath(org, "device", ek), token: true, typ: "application/json", read: done("Device allowed"),
		body: func() ([]byte, error) {
			return json.Marshal(struct {
				Note string `json:"note,omitempty"`
			}{note})
		},
	})
}

// Devices lists the TPMs that an organization allows, newest first.
func (c *Client) Devices(ctx context.Context, org string) ([]Device, error) {
	return list[Device](ctx, c, orgPath(org, "device"))
}

// RemoveDevice ends the permission of a TPM. Keys in it stay.
func (c *Client) RemoveDevice(ctx context.Context, org, ek string) error {
	return c.remove(ctx, orgPath(org, "device", ek), "Device removed", DeviceNotFound)
}
