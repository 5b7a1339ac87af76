package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/login"
)

const maxToken = 64 << 10 // bytes from standard input

// loginSettings are those of login alone.
type loginSettings struct {
	provider  login.Provider
	device    bool
	noBrowser bool
}

func (l *loginSettings) flags(f *pflag.FlagSet) {
	p := &l.provider
	f.StringVar(&p.Issuer, "issuer", "", "the identity provider's `URL`, as the server's ORGKEYS_ISSUER")
	f.StringVar(&p.ClientID, "client-id", "", "the `ID` that the provider knows orgkeysctl by: a public client with the redirect http://127.0.0.1/callback, any port")
	f.StringVar(&p.Resource, "resource", "", "the `URI` that the provider knows the API by (RFC 8707)")
	f.StringVar(&p.Audience, "audience", "", "the `name` that the provider knows the API by, where it has a parameter audience")
	f.StringSliceVar(&p.Scopes, "scope", []string{"openid", "offline_access"}, "the `scopes` to ask for")
	f.StringVar(&p.CAFile, "issuer-ca-file", "", "`file` with certificates to trust for the provider instead of the system's, PEM")
	f.BoolVar(&l.device, "device", false, "log in in a browser on another machine (RFC 8628)")
	f.BoolVar(&l.noBrowser, "no-browser", false, "do not open a browser here, only print the address")
}

func loginFlags() *pflag.FlagSet {
	f := pflag.NewFlagSet("login", pflag.ContinueOnError)
	new(loginSettings).flags(f)
	return f
}

func newLogin(s *settings) *cobra.Command {
	l := &loginSettings{}
	cmd := &cobra.Command{
		Use: "login", Short: "Log in to a server",
		Long: `Logs in to a server, in one of these ways:

  --issuer URL --client-id ID            in the browser of this machine
  --issuer URL --client-id ID --device   in a browser elsewhere
  --token-file FILE                      with a token that something else puts there
                                         and renews; it is read for each request
  --token-file -                         with a token from standard input

The session is kept in --dir, readable by its owner alone, for this server only, and
is refreshed when it needs to be. Settings of the provider that do not change are best kept in
the file config in --dir, as ORGKEYSCTL_ISSUER and so on.`,
		Example: `  orgkeysctl login --server https://orgkeys.example --issuer https://id.example --client-id orgkeysctl --resource https://orgkeys.example
  orgkeys token --org demo --role OWNER | orgkeysctl login --server http://127.0.0.1:3000 --token-file -`,
		Args: cobra.NoArgs,
		RunE: s.explained(func(cmd *cobra.Command, _ []string) error {
			if err := s.load(cmd); err != nil {
				return err
			}
			if _, err := client.New(client.Config{Server: s.server}); err != nil {
				return usage("--server: %w", err)
			}
			session, err := l.session(cmd.Context(), s, cmd.InOrStdin(), cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			session.Server = s.server
			if err := (login.Sessions{Dir: s.dir}).Save(cmd.Context(), session); err != nil {
				return &failure{exit: exitCannotWrite, what: "storing the session", err: err}
			}
			return showSession(cmd.OutOrStdout(), s)
		}),
	}
	l.flags(cmd.Flags())
	return cmd
}

func (l *loginSettings) session(ctx context.Context, s *settings, in io.Reader, log io.Writer) (login.Session, error) {
	switch {
	case s.tokenFile == "-":
		text, err := io.ReadAll(io.LimitReader(in, maxToken))
		if err != nil {
			return login.Session{}, err
		}
		defer clear(text)
		token, err := login.ParseToken(text)
		if err != nil {
			return login.Session{}, usage("standard input: %w", err)
		}
		claims, err := login.ReadClaims(token)
		if err != nil {
			return login.Session{}, usage("standard input: it holds no JWT")
		}
		s.tokenFile = "" // what is shown then is the session
		return login.Session{Access: token, Expires: claims.Expires()}, nil
	case s.tokenFile != "":
		path, err := filepath.Abs(s.tokenFile)
		if err != nil {
			return login.Session{}, err
		}
		_, err = login.ReadTokenFile(path)
		if err != nil {
			return login.Session{}, &tokenError{err}
		}
		return login.Session{TokenFile: path}, nil
	case l.provider.Issuer == "" || l.provider.ClientID == "":
		return login.Session{}, usage("log in where? --issuer and --client-id, or --token-file; orgkeysctl login --help says more")
	case l.device:
		return l.provider.ByDevice(ctx, func(d login.Device) { showDevice(log, d) })
	}
	return l.provider.ByBrowser(ctx, func(address string) {
		fmt.Fprintf(log, "orgkeysctl: log in at this address, in a browser on this machine:\n\n%s\n\n", shown(address))
		if !l.noBrowser {
			openBrowser(address)
		}
	})
}

func showDevice(log io.Writer, d login.Device) {
	fmt.Fprintf(log, "orgkeysctl: log in at %s with the code %s", shown(d.Address), shown(d.Code))
	if d.Complete != "" {
		fmt.Fprintf(log, ", or at %s", shown(d.Complete))
	}
	fmt.Fprintln(log)
}

// openBrowser tries to. Where it fails, the address is on the screen.
func openBrowser(address string) {
	opener := map[string][]string{"darwin": {"open"}, "windows": {"rundll32", "url.dll,FileProtocolHandler"}}[runtime.GOOS]
	if opener == nil {
		opener = []string{"xdg-open"}
	}
	cmd := exec.Command(opener[0], append(opener[1:], address)...)
	if cmd.Start() == nil {
		go func() { _ = cmd.Wait() }()
	}
}

func newLogout(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "logout", Short: "End the session with a server, here and at the provider", Args: cobra.NoArgs,
		RunE: s.explained(func(cmd *cobra.Command, _ []string) error {
			if err := s.load(cmd); err != nil {
				return err
			}
			if err := (login.Sessions{Dir: s.dir}).Remove(cmd.Context(), s.server); err != nil {
				return err
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "logged out")
			return err
		}),
	}
}

func newWhoami(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "whoami", Short: "Show who is logged in, by what the token says",
		Long: `Shows who is logged in, by what the token says. It asks the provider if the token
has to be refreshed, and the server nothing: what counts there is the server's
reading of the token ("orgkeys token explain").`,
		Args: cobra.NoArgs,
		RunE: s.explained(func(cmd *cobra.Command, _ []string) error {
			if err := s.load(cmd); err != nil {
				return err
			}
			if _, err := s.token(cmd.Context()); err != nil {
				return err
			}
			return showSession(cmd.OutOrStdout(), s)
		}),
	}
}

// identity is what is shown of a session.
type identity struct {
	Server   string       `json:"server"`
	Subject  string       `json:"subject"`
	Org      string       `json:"orgId,omitempty"`
	Issuer   string       `json:"issuer,omitempty"`
	Expires  time.Time    `json:"expires,omitzero"`
	Renewed  string       `json:"renewed"` // by whom the token is renewed
	Claims   login.Claims `json:"claims,omitempty"`
	Readable bool         `json:"jwt"`
}

func showSession(w io.Writer, s *settings) error {
	who, err := s.identity()
	if err != nil {
		return err
	}
	if s.json {
		return printJSON(w, who)
	}
	audience, _ := json.Marshal(who.Claims["aud"])
	roles, _ := json.Marshal(who.Claims["org_role"])
	return fields(w, field{"server", who.Server}, field{"subject", who.Subject}, field{"organization", cmp.Or(who.Org, "not in the token")},
		field{"role", known(roles)}, field{"issuer", who.Issuer}, field{"audience", known(audience)},
		field{"expires", instant(who.Expires)}, field{"renewed", who.Renewed})
}

// known is a claim's JSON, empty for one that is not there.
func known(text []byte) string {
	if string(text) == "null" {
		return ""
	}
	return string(text)
}

func (s *settings) identity() (identity, error) {
	var session login.Session
	if s.tokenFile == "" {
		var err error
		if session, err = (login.Sessions{Dir: s.dir}).Load(s.server); err != nil {
			return identity{}, &tokenError{err}
		}
	}
	token := session.Access
	if file := cmp.Or(s.tokenFile, session.TokenFile); file != "" {
		var err error
		if token, err = login.ReadTokenFile(file); err != nil {
			return identity{}, &tokenError{err}
		}
		session.TokenFile = file
	}
	who := identity{Server: s.server, Renewed: renewed(session)}
	claims, err := login.ReadClaims(token)
	if err != nil && !errors.Is(err, login.ErrOpaque) {
		return identity{}, err
	}
	who.Readable, who.Claims = err == nil, claims
	who.Subject, who.Issuer, who.Expires = claims.Text("sub"), claims.Text("iss"), claims.Expires()
	who.Org = cmp.Or(s.org, claims.Text("org_id"))
	return who, nil
}

func renewed(session login.Session) string {
	switch {
	case session.TokenFile != "":
		return "by whatever writes " + session.TokenFile
	case session.Refresh != "":
		return "by itself"
	}
	return "by another login"
}
