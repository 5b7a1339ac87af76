package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/orgkeys/orgkeys/client"
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
	token    string // the file with the enrollment token
	caFile   string
	tlsCert  string
	tlsKey   string
	dir      string
	config   string
	wait     patience
	json     bool

	recipientFile string
	origin        string // who makes the key
	tpm           string // the TPM's path; empty: keys are in files
	sealedFile    string
	receiptFile   string

	servicesNumber int64 // services, read
}

// patience is a duration, or client.Forever.
type patience time.Duration

func (p *patience) String() string {
	if time.Duration(*p) == client.Forever {
		return "forever"
	}
	return time.Duration(*p).String()
}

func (p *patience) Set(text string) error {
	if text == "forever" {
		*p = patience(client.Forever)
		return nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 {
		return errors.New("want a duration such as 5m, or forever")
	}
	*p = patience(d)
	return nil
}

// flags declares every flag over s, each with its default.
func (s *settings) flags(f *flag.FlagSet) {
	f.StringVar(&s.server, "server", "", "the server's `URL`, https://…")
	f.StringVar(&s.org, "org", "", "the organization's `ID`")
	f.StringVar(&s.ip, "ip", "", "this node's IP `address`, which identifies it")
	f.StringVar(&s.region, "region", "", "this node's `region`")
	f.StringVar(&s.version, "version", "1", "the `version` that the node reports")
	f.StringVar(&s.status, "status", "active", "the `status` that the node reports")
	f.StringVar(&s.url, "url", "", "the `URL` that the node reports")
	f.StringVar(&s.provider, "provider", "", "the storage `provider` that the node reports, such as S3, GCS or AZURE")
	f.StringVar(&s.services, "services", "", "the services that the node reports, a `number`: the sum of 1 (storage), 2 (AI and language models) and 4 (chat)")
	f.StringVar(&s.keyFile, "key-file", "", "the `file` with the private key, PEM, which only its owner may read (default "+usualKeyFile+", or of a node that enrolls key.pem in --dir)")
	f.StringVar(&s.token, "token-file", "", "a `file` with the enrollment token by which boot and enroll fetch the private key; removed once the key is there (default the systemd credential "+tokenCredential+", if there is one)")
	f.StringVar(&s.recipientFile, "recipient-file", "", "the `file` with the private key that opens what is sealed to it, PEM (default the key file with .recipient behind it)")
	f.StringVar(&s.origin, "origin", originBackend, "who makes the key that boot and enroll get with a token: `backend`, which is the server's, or node; the enrollment says the same")
	f.StringVar(&s.tpm, "tpm", "", "the `path` of a TPM 2.0, as a device or a Unix socket, that new private keys stay in (a key that is in one already uses "+usualTPM+" unless this says another)")
	f.StringVar(&s.sealedFile, "sealed-file", "", "the `file` with the sealed key as the server answered it, JSON")
	f.StringVar(&s.receiptFile, "receipt-file", "", "a `file` for the receipt of a sealed key, JSON, to send to the server")
	f.StringVar(&s.caFile, "ca-file", "", "a `file` with certificates to trust instead of the system's, PEM")
	f.StringVar(&s.tlsCert, "tls-cert", "", "a `file` with the client certificate for a server that asks for one, PEM")
	f.StringVar(&s.tlsKey, "tls-key", "", "the `file` with the client certificate's private key, PEM, which only its owner may read")
	f.StringVar(&s.dir, "dir", "/var/lib/orgkeys-node", "the `directory` for secrets, a file each")
	f.StringVar(&s.config, "config", "", "a `file` with the variables below, a line each as NAME=VALUE; the environment and flags win over it")
	s.wait = patience(5 * time.Minute)
	f.Var(&s.wait, "wait", "how long to go on while something that may pass is in the way: a `duration` such as 5m, or forever")
	f.BoolVar(&s.json, "json", false, "print the outcome as one line of JSON")
}

// usualKeyFile is where a key is that an administrator put there.
const usualKeyFile = "/etc/orgkeys-node/key.pem"

// tokenCredential is the name under which systemd hands a token over
// (systemd.exec(5), LoadCredential=).
const tokenCredential = "orgkeys-node.token"

const variablePrefix = "ORGKEYS_NODE_"

// variable is the environment variable of a flag.
func variable(flagName string) string {
	return variablePrefix + strings.ToUpper(strings.ReplaceAll(flagName, "-", "_"))
}

// flagHelp describes the flags of these names, or all.
func flagHelp(only []string) string {
	var b strings.Builder
	all := flag.NewFlagSet("", flag.ContinueOnError)
	(&settings{}).flags(all)
	f := flag.NewFlagSet("", flag.ContinueOnError)
	f.SetOutput(&b)
	all.VisitAll(func(one *flag.Flag) {
		if only == nil || slices.Contains(only, one.Name) {
			f.Var(one.Value, one.Name, one.Usage+" ("+variable(one.Name)+")")
			f.Lookup(one.Name).DefValue = one.DefValue
		}
	})
	f.PrintDefaults()
	return b.String()
}

func usageError(format string, args ...any) error {
	return &failure{exit: exitUsage, what: fmt.Sprintf(format, args...), hint: "orgkeys-node --help lists commands and settings"}
}

func parseSettings(ctx context.Context, command string, args []string, progress io.Writer) (settings, error) {
	s := settings{command: command}
	if find(command) == nil {
		return s, usageError("there is no command %q%s", command, meant(command, commandNames()))
	}
	f := flag.NewFlagSet(command, flag.ContinueOnError)
	f.SetOutput(io.Discard)
	s.flags(f)
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return s, err
		}
		return s, usageError("%s", err)
	}
	if f.NArg() > 0 {
		return s, usageError("%q is one argument too many", f.Arg(0))
	}
	given := map[string]bool{}
	f.Visit(func(one *flag.Flag) { given[one.Name] = true })
	if err := readEnvironment(f, given); err != nil {
		return s, err
	}
	if s.config != "" {
		if err := s.awaitConfig(ctx, progress); err != nil {
			return s, err
		}
		if err := readEnvironment(f, given); err != nil {
			return s, err
		}
	}
	if find(command).needs.sealed && (s.sealedFile == "" || s.keyFile == "") {
		return s, usageError("%s needs --sealed-file and --key-file", command)
	}
	s.resolve()
	return s, s.check()
}

// resolve finds the files that are not named.
func (s *settings) resolve() {
	if dir := credentials(); s.token == "" && dir != "" {
		// While a unit reloads, systemd names a directory that cannot be read.
		if path := filepath.Join(dir, tokenCredential); exists(path) {
			s.token = path
		}
	}
	if s.keyFile == "" {
		s.keyFile = usualKeyFile
		// A node stays enrolled when its token is gone.
		if own := filepath.Join(s.dir, "key.pem"); s.token != "" || s.command == "recipient" || exists(own+recordSuffix) {
			s.keyFile = own
		}
	}
	if s.recipientFile == "" {
		s.recipientFile = s.keyFile + recipientSuffix
	}
}

// credentials is the directory of the unit's credentials; empty without systemd.
func credentials() string { return os.Getenv("CREDENTIALS_DIRECTORY") }

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// awaitConfig adds the variables of the settings file to the environment. The
// file may come after the machine's start, as keys may, and come piece by piece.
func (s *settings) awaitConfig(ctx context.Context, progress io.Writer) error {
	retry := client.Retry{For: time.Duration(s.wait), Waiting: waiting(*s, progress)}
	retry.Temporary = func(err error) bool { return errors.As(err, new(*notYet)) }
	return retry.Do(ctx, func(context.Context) error {
		text, err := readConfig(s.config)
		if errors.Is(err, fs.ErrPermission) && s.isComplete() {
			// systemd reads the file as root, and has put it into the environment.
			_, _ = fmt.Fprintf(progress, "orgkeys-node: %s: settings file %s cannot be read by user %d; the environment has what is needed\n", s.command, s.config, os.Geteuid())
			return nil
		}
		if err != nil {
			return &notYet{failure{exitConfig, "settings file " + s.config, "put the settings there, readable by the user that this runs as (mode 0644)", err}}
		}
		return addEnvironment(s.config, text)
	})
}

// notYet is why a settings file is waited for.
type notYet struct{ failure }

func (n *notYet) Unwrap() error { return &n.failure }

// isComplete reports whether the command has all it needs without a settings file.
func (s settings) isComplete() bool {
	s.resolve()
	return s.check() == nil
}

// settled is how long a settings file has not changed when it is believed to be
// whole: half a line is a setting too, with another meaning.
const settled = time.Second

func readConfig(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close() // opened for reading: nothing can be lost
	text, err := io.ReadAll(f)
	if err != nil {
		return "", err
	}
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if age := time.Since(info.ModTime()); age >= 0 && age < settled { // a clock may be set back
		return "", errors.New("it was written a moment ago, and may not be whole yet")
	}
	if strings.TrimSpace(string(text)) == "" {
		return "", errors.New("it is empty")
	}
	return string(text), nil
}

// addEnvironment sets the variables in a text as systemd's EnvironmentFile
// would, where they are not set already.
func addEnvironment(path, text string) error {
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		if !ok || !variableForm.MatchString(name) {
			return usageError("%s, line %d: not NAME=VALUE", path, i+1)
		}
		if _, set := os.LookupEnv(name); set {
			continue
		}
		if err := os.Setenv(name, unquoted(value)); err != nil {
			return usageError("%s, line %d: %s", path, i+1, err)
		}
	}
	return nil
}

var variableForm = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

func unquoted(value string) string {
	for _, quote := range []string{`"`, `'`} {
		if len(value) > 1 && strings.HasPrefix(value, quote) && strings.HasSuffix(value, quote) {
			return value[1 : len(value)-1]
		}
	}
	return value
}

// readEnvironment sets the flags that were not given on the command line from
// their variables, and refuses variables of orgkeys-node that there are not: a
// misspelt one would be a setting without effect.
func readEnvironment(f *flag.FlagSet, given map[string]bool) error {
	names := map[string]string{}
	f.VisitAll(func(one *flag.Flag) { names[variable(one.Name)] = one.Name })
	for _, entry := range os.Environ() {
		name, value, _ := strings.Cut(entry, "=")
		if !strings.HasPrefix(name, variablePrefix) || ofKubernetes.MatchString(name) {
			continue
		}
		flagName, known := names[name]
		if !known {
			return usageError("%s is no setting; did you mean %s?", name, nearest(strings.ToUpper(name), names))
		}
		if given[flagName] {
			continue
		}
		if err := f.Set(flagName, value); err != nil {
			return usageError("%s is %q: %s", name, value, err)
		}
	}
	return nil
}

// ofKubernetes are the variables that Kubernetes adds to every pod beside a
// Service called orgkeys-node, or orgkeys-node-….
var ofKubernetes = regexp.MustCompile(`^ORGKEYS_NODE_([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$`)

// nearest is the known name that takes the fewest changes to get from name.
func nearest(name string, known map[string]string) (best string) {
	fewest := math.MaxInt
	for k := range known {
		if n := changes(name, k); n < fewest || n == fewest && k < best {
			best, fewest = k, n
		}
	}
	return best
}

// changes is the Levenshtein distance between two texts.
func changes(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			substituted := diagonal
			if a[i] != b[j] {
				substituted++
			}
			diagonal = row[j+1]
			row[j+1] = min(substituted, row[j+1]+1, row[j]+1)
		}
	}
	return row[len(b)]
}

func (s *settings) check() error {
	needs := find(s.command).needs
	if needs.server {
		// What New refuses is the URL alone.
		if _, err := client.New(client.Config{Server: s.server}); err != nil {
			return usageError("--server: %s", err)
		}
	}
	if s.origin != originBackend && s.origin != originNode {
		return usageError("--origin %q is neither backend nor node", s.origin)
	}
	if (s.tlsCert == "") != (s.tlsKey == "") {
		return usageError("--tls-cert and --tls-key belong together")
	}
	if s.org != "" || needs.node && s.token == "" && !exists(s.keyFile+recordSuffix) {
		if s.org == "" && credentials() != "" {
			// A unit has the credentials that there were when it started.
			return &failure{exit: exitConfig, what: "there is no credential " + tokenCredential + ", and --org is not set", hint: "put a token there, or set --token-file or --org, and start the unit again"}
		}
		if _, err := org.Parse(s.org); err != nil {
			return usageError("--org %q is not an organization ID", s.org)
		}
	}
	if needs.node {
		return s.checkNode()
	}
	return nil
}

func (s *settings) checkNode() error {
	if addr, err := netip.ParseAddr(s.ip); err != nil || addr.Zone() != "" {
		return usageError("--ip %q is not an IP address", s.ip)
	}
	if s.region == "" || strings.ContainsAny(s.region, "|\r\n") {
		return usageError("--region %q is empty, or has a | in it", s.region)
	}
	for _, said := range [][2]string{{"region", s.region}, {"version", s.version}, {"status", s.status}, {"url", s.url}, {"provider", s.provider}} {
		if !utf8.ValidString(said[1]) {
			return usageError("--%s %q is not UTF-8", said[0], said[1])
		}
	}
	if s.services == "" {
		return nil
	}
	var err error
	if s.servicesNumber, err = strconv.ParseInt(s.services, 10, 64); err != nil {
		return usageError("--services %q is not a number", s.services)
	}
	return nil
}
