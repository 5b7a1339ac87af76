package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/internal/org"
)

type settings struct {
	command  string
	server   string
	org      string
	ip       string
	region   string
	version  string
	status   string
	url      string
	provider string
	services string
	keyFile  string
	caFile   string
	dir      string
	wait     time.Duration
	json     bool

	base           *url.URL // server, checked
	servicesNumber int64    // services, read
}

// flags declares every flag over s, each with its environment variable as the default.
func (s *settings) flags(f *flag.FlagSet) {
	text := func(p *string, name, fallback, doc string) {
		variable := "ORGKEYS_NODE_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
		if v, ok := os.LookupEnv(variable); ok {
			fallback = v
		}
		f.StringVar(p, name, fallback, doc+" ("+variable+")")
	}
	text(&s.server, "server", "", "the server's URL, https://…")
	text(&s.org, "org", "", "the organization's ID")
	text(&s.ip, "ip", "", "this node's IP address, which identifies it")
	text(&s.region, "region", "", "this node's region")
	text(&s.version, "version", "1", "the version that the node reports")
	text(&s.status, "status", "active", "the status that the node reports")
	text(&s.url, "url", "", "the URL that the node reports")
	text(&s.provider, "provider", "", "S3, GCS, AZURE, AWS or GCP")
	text(&s.services, "services", "", "the number of services that the node reports")
	text(&s.keyFile, "key-file", "/etc/orgkeys-node/key.pem", "the organization key, PEM, mode 0600")
	text(&s.caFile, "ca-file", "", "certificates to trust instead of the system's, PEM")
	text(&s.dir, "dir", "/var/lib/orgkeys-node", "where secrets go, a file each")
	f.DurationVar(&s.wait, "wait", 5*time.Minute, "how long to go on trying while the server cannot be reached")
	f.BoolVar(&s.json, "json", false, "print the outcome as one line of JSON")
}

func flagHelp() string {
	var b strings.Builder
	f := flag.NewFlagSet("", flag.ContinueOnError)
	f.SetOutput(&b)
	(&settings{}).flags(f)
	f.PrintDefaults()
	return b.String()
}

func usageError(format string, args ...any) error {
	return &failure{exit: exitUsage, what: fmt.Sprintf(format, args...), hint: "orgkeys-node --help lists commands and settings"}
}

func parseSettings(command string, args []string) (settings, error) {
	s := settings{command: command}
	f := flag.NewFlagSet(command, flag.ContinueOnError)
	f.SetOutput(io.Discard)
	s.flags(f)
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return s, err
		}
		return s, usageError("%s", err)
	}
	switch command {
	case "boot", "secrets", "register", "unregister", "status":
	default:
		return s, usageError("there is no command %q", command)
	}
	if f.NArg() > 0 {
		return s, usageError("%q is one argument too many", f.Arg(0))
	}
	return s, s.check()
}

func (s *settings) check() error {
	var err error
	if s.base, err = checkServer(s.server); err != nil {
		return err
	}
	if s.wait < 0 {
		return usageError("--wait %s is in the past", s.wait)
	}
	if s.command == "status" {
		return nil
	}
	if _, err := org.Parse(s.org); err != nil {
		return usageError("--org %q is not an organization ID", s.org)
	}
	if addr, err := netip.ParseAddr(s.ip); err != nil || addr.Zone() != "" {
		return usageError("--ip %q is not an IP address", s.ip)
	}
	if s.region == "" || strings.ContainsAny(s.region, "|\r\n") {
		return usageError("--region %q is empty, or has a | in it", s.region)
	}
	if s.services == "" {
		return nil
	}
	if s.servicesNumber, err = strconv.ParseInt(s.services, 10, 64); err != nil {
		return usageError("--services %q is not a number", s.services)
	}
	return nil
}

// checkServer refuses to send secrets or signatures over a network in the clear.
func checkServer(server string) (*url.URL, error) {
	u, err := url.Parse(server)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		return nil, usageError("--server %q is not of the form https://host or https://host:port", server)
	}
	u.Path = strings.TrimRight(u.Path, "/")
	switch u.Scheme {
	case "https":
		return u, nil
	case "http":
		addr, err := netip.ParseAddr(u.Hostname())
		if u.Hostname() == "localhost" || (err == nil && addr.Unmap().IsLoopback()) {
			return u, nil
		}
	}
	return nil, usageError("--server %q is not https, and http is for this machine only", server)
}
