package console

import (
	"context"
	"log/slog"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/login"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/session"
)

// A replica whose clock is ahead, or which has not the issuer's newest keys, refuses a token
// that the others accept: the session is everybody's, and goes on with them. What ends it is
// its holder, and its time.
func TestOneReplicasRefusalEndsNoSession(t *testing.T) {
	t.Parallel()
	kept := &droppable{sessions: sessions{}}
	replica := func(answer error) *Console {
		c, err := New(Config{
			Sessions: kept, URL: "https://keys.example", Provider: &login.Web{}, Log: slog.New(slog.DiscardHandler),
			Client: func(*http.Request) netip.Addr { return stranger }, Shared: func(netip.Addr) bool { return false },
			Authenticate: func(context.Context, http.Header) (authz.Caller, error) {
				return authz.Caller{Kind: authz.Person, Subject: "ada", Org: org.ID("acme"), Roles: []authz.Role{authz.Owner}}, answer
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		c.Asking(http.NotFoundHandler())
		return c
	}
	secret := session.NewSecret()
	stored, err := secret.Seal("token", "holder", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	kept.sessions[stored.ID] = stored
	cookie := "__Host-orgkeys-session-443=" + secret.Text()
	for _, reason := range []string{authn.ReasonExpired, authn.ReasonNotYetValid, authn.ReasonUnknownKey, authn.ReasonSignature, authn.ReasonIssuer} {
		w := ask(replica(&authn.TokenError{Reason: reason}), t.Context(), "GET", "/console/keys", cookie)
		if w.Code != http.StatusSeeOther || w.Header().Get("Location") != "/console/sign-in?to=%2Fconsole%2Fkeys" || len(w.Result().Cookies()) > 0 {
			t.Errorf("%s: %d %v", reason, w.Code, w.Header())
		}
		if len(kept.sessions) != 1 {
			t.Fatalf("%s: one replica's refusal ended the session of all", reason)
		}
	}
	if w := ask(replica(nil), t.Context(), "POST", "/console/sign-out", cookie); w.Code != http.StatusSeeOther || len(kept.sessions) != 0 {
		t.Errorf("signing out: %d, %d sessions left", w.Code, len(kept.sessions))
	}
}

type droppable struct{ sessions }

func (d *droppable) DropSession(_ context.Context, id string) error {
	delete(d.sessions, id)
	return nil
}
