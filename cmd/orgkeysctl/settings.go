package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-envparse"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// settings are what every command needs.
type settings struct {
	config    string
	dir       string
	server    string
	org       string
	caFile    string
	tlsCert   string
	tlsKey    string
	tokenFile string
	wait      time.Duration
	json      bool
}

func (s *settings) flags(f *pflag.FlagSet) {
	f.StringVar(&s.config, "config", "", "`file` with settings (default: config in --dir, if it is there)")
	f.StringVar(&s.dir, "dir", "", "`directory` for the login and for keys on their way (default: orgkeysctl in the user's configuration directory)")
	f.StringVar(&s.server, "server", "", "the server's `URL`, https://…")
	f.StringVar(&s.org, "org", "", "the organization's `ID` (default: the token's org_id, if it has one)")
	f.StringVar(&s.caFile, "ca-file", "", "`file` with certificates to trust for the server instead of the system's, PEM")
	f.StringVar(&s.tlsCert, "tls-cert", "", "`file` with the client certificate for a server that asks for one, PEM")
	f.StringVar(&s.tlsKey, "tls-key", "", "`file` with that certificate's private key, PEM, which only its owner may read")
	f.StringVar(&s.tokenFile, "token-file", "", "`file` with a bearer token, used in place of a login and read for each request")
	f.DurationVar(&s.wait, "wait", 30*time.Second, "how long to go on while the server cannot be reached or cannot serve: a `duration`")
	f.BoolVar(&s.json, "json", false, "print JSON")
}

const variablePrefix = "ORGKEYSCTL_"

// perRun are flags that are no settings: a file or the environment must not
// turn them on unseen.
var perRun = []string{"help", "version"}

func variable(flag string) string {
	return variablePrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// load sets the flags that the command line did not, from the environment and
// then from the file.
func (s *settings) load(cmd *cobra.Command) error {
	known := variables(cmd.Root())
	environment := map[string]string{}
	for _, entry := range os.Environ() {
		if name, value, _ := strings.Cut(entry, "="); strings.HasPrefix(name, variablePrefix) {
			environment[name] = value
		}
	}
	if err := apply(cmd, known, environment, "the environment"); err != nil {
		return err
	}
	if s.dir == "" {
		base, err := os.UserConfigDir()
		if err != nil {
			return usage("%w: say where to keep the login, with --dir", err)
		}
		s.dir = filepath.Join(base, "orgkeysctl")
	}
	return s.loadFile(cmd, known)
}

func (s *settings) loadFile(cmd *cobra.Command, known map[string]*pflag.Flag) error {
	path := s.config
	if path == "" {
		path = filepath.Join(s.dir, "config")
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) && s.config == "" {
		return nil
	}
	if err != nil {
		return &failure{exit: exitConfig, what: "settings", err: err}
	}
	defer f.Close()
	values, err := envparse.Parse(f)
	if err != nil {
		return &failure{exit: exitConfig, what: path, hint: "each line is NAME=VALUE", err: err}
	}
	return apply(cmd, known, values, path)
}

// variables maps each setting's variable to its flag, for all commands: a
// variable of another command is no mistake.
func variables(root *cobra.Command) map[string]*pflag.Flag {
	known := map[string]*pflag.Flag{}
	for _, flags := range []*pflag.FlagSet{root.PersistentFlags(), loginFlags()} {
		flags.VisitAll(func(f *pflag.Flag) {
			if !slices.Contains(perRun, f.Name) {
				known[variable(f.Name)] = f
			}
		})
	}
	return known
}

func apply(cmd *cobra.Command, known map[string]*pflag.Flag, values map[string]string, from string) error {
	for name, value := range values {
		setting, ok := known[name]
		if !ok {
			return usage("%s in %s is no setting: orgkeysctl --help and orgkeysctl login --help list them", name, from)
		}
		f := cmd.Flags().Lookup(setting.Name)
		// A flag of this name that means something else is not set: --scope of a login
		// is that of tokens, --scope of "key list" is that of keys.
		if f == nil || f.Changed || f.Usage != setting.Usage {
			continue
		}
		if err := cmd.Flags().Set(setting.Name, value); err != nil {
			return usage("%s in %s: %w", name, from, err)
		}
	}
	return nil
}

func usage(format string, args ...any) error {
	return &failure{exit: exitUsage, err: fmt.Errorf(format, args...)}
}
