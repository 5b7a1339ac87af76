package login

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A provider has rotated the refresh token by the time that its answer is read: whatever
// else is in that answer, the new one is kept, and the next refresh goes by it.
func TestARotatedRefreshTokenIsKept(t *testing.T) {
	t.Parallel()
	jwt := func(claims string) string {
		encode := base64.RawURLEncoding.EncodeToString
		return encode([]byte(`{"alg":"none"}`)) + "." + encode([]byte(claims)) + "."
	}
	plain := jwt(`{"sub":"ada"}`)
	dated := jwt(fmt.Sprintf(`{"sub":"ada","exp":%d}`, time.Now().Add(time.Hour).Unix()))
	for name, c := range map[string]struct {
		answer  string // beside the refresh token
		fails   error
		expires time.Duration // from now, 0: it is not said
	}{
		"a number":              {`"access_token":"` + plain + `","expires_in":600`, nil, 10 * time.Minute},
		"a text":                {`"access_token":"` + plain + `","expires_in":"600"`, nil, 10 * time.Minute},
		"a fraction":            {`"access_token":"` + plain + `","expires_in":600.0`, nil, 10 * time.Minute},
		"no number":             {`"access_token":"` + dated + `","expires_in":"an hour"`, nil, time.Hour},
		"an object":             {`"access_token":"` + plain + `","expires_in":{"seconds":600}`, nil, 0},
		"null":                  {`"access_token":"` + plain + `","expires_in":null`, nil, 0},
		"far too many":          {`"access_token":"` + plain + `","expires_in":1e300`, nil, 0},
		"a description no text": {`"access_token":"` + plain + `","expires_in":600,"error_description":{}`, nil, 10 * time.Minute},
		"an opaque token":       {`"access_token":"opaque","expires_in":600`, ErrOpaque, 0},
		"no token":              {`"token_type":"Bearer"`, ErrProvider, 0},
		"one that is over":      {`"access_token":"` + plain + `","expires_in":1`, ErrProvider, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var provider *httptest.Server
			rotations := 0
			mux := http.NewServeMux()
			mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				fmt.Fprintf(w, `{"issuer":%[1]q,"authorization_endpoint":"%[1]s/auth","token_endpoint":"%[1]s/token","jwks_uri":"%[1]s/jwks"}`, provider.URL)
			})
			mux.HandleFunc("/token", func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				if r.PostFormValue("refresh_token") != strconv.Itoa(rotations) {
					w.WriteHeader(http.StatusBadRequest)
					_, _ = w.Write([]byte(`{"error":"invalid_grant"}`))
					return
				}
				rotations++
				fmt.Fprintf(w, `{%s,"refresh_token":"%d"}`, c.answer, rotations)
			})
			provider = httptest.NewServer(mux)
			defer provider.Close()
			const server = "https://keys.example"
			kept := Sessions{Dir: filepath.Join(t.TempDir(), "sessions")}
			err := kept.Save(t.Context(), Session{Server: server, Provider: Provider{Issuer: provider.URL, ClientID: "ctl"}, Access: "old", Refresh: "0", Expires: time.Now()})
			if err != nil {
				t.Fatal(err)
			}
			token, err := kept.Token(t.Context(), server)
			after, loadErr := kept.Load(server)
			if loadErr != nil || after.Refresh != "1" || after.Server != server || after.Provider.Issuer != provider.URL {
				t.Fatalf("%v; after it: %+v, %v", err, after, loadErr)
			}
			if !errors.Is(err, c.fails) || c.fails == nil && err != nil {
				t.Fatalf("%v, want %v", err, c.fails)
			}
			if c.fails == nil && (token != after.Access || !strings.HasPrefix(token, "ey")) {
				t.Errorf("the token is %q, and %q is kept", token, after.Access)
			}
			if left := time.Until(after.Expires); c.expires == 0 && !after.Expires.IsZero() || c.expires > 0 && (left > c.expires || left < c.expires-time.Minute) {
				t.Errorf("it is kept until %v", after.Expires)
			}
			if c.fails == nil {
				return
			}
			if _, err := kept.Token(t.Context(), server); errors.Is(err, ErrOver) || rotations != 2 {
				t.Errorf("the next: %v, after %d rotations", err, rotations)
			}
		})
	}
}
