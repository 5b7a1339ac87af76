package config

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/hashicorp/go-envparse"

	"github.com/orgkeys/orgkeys/internal/privatefile"
)

// origin is where each setting's value comes from, as " (line 3 of FILE)", or
// nothing for one of the environment.
type origin map[string]string

// fromFile reads settings from a file of NAME=VALUE lines. A value without
// quotes is used unchanged, as in the environment: systemd and container engines read
// such files too.
func fromFile(path string) (map[string]string, origin, error) {
	b, err := privatefile.Read(path, maxFile, privatefile.Owner)
	if err != nil {
		return nil, nil, fmt.Errorf("reading the settings: %w", err)
	}
	given, from := map[string]string{}, origin{}
	number := 0
	for line := range bytes.Lines(b) {
		number++
		name, value, err := setting(string(line))
		where := fmt.Sprintf(" (line %d of %s)", number, path)
		switch {
		case err != nil:
			return nil, nil, fmt.Errorf("reading the settings: %w%s", err, where)
		case name == "":
		case !strings.HasPrefix(name, prefix) && !forLibrary(name):
			return nil, nil, fmt.Errorf("%s is neither a setting of orgkeys, which begin with %s, nor a variable of a library that docs/settings.md names%s", name, prefix, where)
		case from[name] != "":
			return nil, nil, fmt.Errorf("%s is given twice%s%s", name, from[name], where)
		default:
			given[name], from[name] = value, where
		}
	}
	return given, from, nil
}

// setting reads a line; its name is empty if there is none on it.
func setting(line string) (name, value string, err error) {
	line = strings.TrimSpace(line)
	if line == "" || line[0] == '#' {
		return "", "", nil
	}
	name, value, found := strings.Cut(strings.TrimPrefix(line, "export "), "=")
	name, value = strings.TrimSpace(name), strings.TrimSpace(value)
	if !found || !settingName.MatchString(name) {
		return "", "", errors.New("not a line of NAME=VALUE")
	}
	if value != "" && strings.ContainsRune(`"'`, rune(value[0])) {
		value, err = quoted(name, value)
		return name, value, err
	}
	if comment.MatchString(value) {
		return "", "", fmt.Errorf("%s: put the value in quotes if # belongs to it, and a comment on a line of its own if not", name)
	}
	return name, value, nil
}

var (
	settingName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	comment     = regexp.MustCompile(`\s#`)
	oneQuoted   = regexp.MustCompile(`^('[^']*'|"([^"\\]|\\.)*")\s*(#.*)?$`)
)

// quoted is the text in single or double quotes; in the latter \ escapes.
func quoted(name, value string) (string, error) {
	if !oneQuoted.MatchString(value) {
		return "", fmt.Errorf("%s: the quote that begins the value does not end it", name)
	}
	pairs, err := envparse.Parse(strings.NewReader(name + "=" + value))
	if err != nil {
		return "", fmt.Errorf("%s: what is in quotes cannot be read", name)
	}
	return pairs[name], nil
}

// settingIn finds the names of settings in a message.
var settingIn = regexp.MustCompile(`ORGKEYS_[A-Z0-9_]+`)

// locate adds to an error where the settings that it names were given.
func (o origin) locate(err error) error {
	if err == nil {
		return nil
	}
	var places []string
	for _, name := range settingIn.FindAllString(err.Error(), -1) {
		if place := o[name]; place != "" && !slices.Contains(places, place) {
			places = append(places, place)
		}
	}
	return fmt.Errorf("%w%s", err, strings.Join(places, ""))
}

// injected are the variables that Kubernetes puts into every pod for each Service
// of its namespace, here for one called orgkeys, or orgkeys-ANYTHING: their names,
// and what their values are. A setting that is misspelt is none of them.
var injected = []struct {
	name  *regexp.Regexp
	value func(string) bool
}{
	{regexp.MustCompile(`^ORGKEYS_([A-Z0-9_]+_)?SERVICE_HOST$`), isAddress},
	{regexp.MustCompile(`^ORGKEYS_([A-Z0-9_]+_)?SERVICE_PORT(_[A-Z0-9_]+)?$`), isPort},
	{regexp.MustCompile(`^ORGKEYS_([A-Z0-9_]+_)?PORT(_[0-9]+_(TCP|UDP|SCTP))?$`), isEndpoint},
	{regexp.MustCompile(`^ORGKEYS_([A-Z0-9_]+_)?PORT_[0-9]+_(TCP|UDP|SCTP)_PROTO$`), isProtocol},
	{regexp.MustCompile(`^ORGKEYS_([A-Z0-9_]+_)?PORT_[0-9]+_(TCP|UDP|SCTP)_PORT$`), isPort},
	{regexp.MustCompile(`^ORGKEYS_([A-Z0-9_]+_)?PORT_[0-9]+_(TCP|UDP|SCTP)_ADDR$`), isAddress},
}

func byKubernetes(name, value string) bool {
	for _, i := range injected {
		if i.name.MatchString(name) && i.value(value) {
			return true
		}
	}
	return false
}

func isAddress(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}

func isPort(s string) bool {
	_, err := netip.ParseAddrPort("0.0.0.0:" + s)
	return err == nil
}

func isProtocol(s string) bool { return slices.Contains([]string{"tcp", "udp", "sctp"}, s) }

func isEndpoint(s string) bool {
	protocol, address, _ := strings.Cut(s, "://")
	_, err := netip.ParseAddrPort(address)
	return isProtocol(protocol) && err == nil
}
