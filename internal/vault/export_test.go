package vault

import (
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// What the tests need to see from outside.
var (
	Granted = granted
	Denied  = denied
)

func (c *Client) Token() string    { return c.current.Load().token }
func (c *Client) API() *api.Client { return c.current.Load().api }

func FreshKey(body []byte, date time.Time, callTimeout time.Duration) (orgkey.Public, error) {
	return freshKey(response{body: body, date: date}, callTimeout)
}

var PrivateKey = privateKey

const LoginPause = loginPause

var RefusedPause = refusedPause
