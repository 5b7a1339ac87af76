// Package snippet is how to bring an enrollment's token to a machine: texts to paste,
// which the command line prints and the console shows.
package snippet

import (
	"errors"
	"fmt"
	"io"
	"strings"
)

// ErrUnsafe: a part has a character that shells, YAML or systemd care about.
var ErrUnsafe = errors.New("cannot stand in a snippet")

// Kinds returns the names of the snippets, in the order in which they are offered.
func Kinds() []string { return []string{"shell", "cloud-init", "systemd"} }

// Enrollment is what a snippet is about.
type Enrollment struct {
	Server, ID, Token string
	OwnKey            bool // the node makes the key (origin node)
	TPM               bool // in its TPM
}

// needs is what the shipped unit lacks for the enrollment, as comments.
func (e Enrollment) needs() string {
	if !e.TPM {
		return ""
	}
	return `# The unit opens the TPM only with a drop-in that has PrivateDevices=no,
# DeviceAllow=/dev/tpmrm0 rw and the group of the device: docs/nodes.md.
`
}

// settings are those that the enrollment asks for, as flags and as variables.
func (e Enrollment) settings() (flags, variables string) {
	if e.OwnKey {
		flags, variables = " --origin node", "ORGKEYS_NODE_ORIGIN=node\n"
	}
	if e.TPM {
		flags += " --tpm /dev/tpmrm0"
		variables += "ORGKEYS_NODE_TPM=/dev/tpmrm0\n"
	}
	return flags, variables
}

// Write writes the snippet of that kind. What goes in has none of the characters that
// YAML, systemd or a shell's quotes care about: the token is base64url and hyphens, and
// the server's URL and the ID are checked. A URL may have brackets, around an IPv6
// address, which a shell takes for a pattern: it stands in quotes or a here-document.
func Write(w io.Writer, kind string, e Enrollment) error {
	text, known := map[string]string{"shell": shellSnippet, "cloud-init": cloudSnippet, "systemd": systemdSnippet}[kind]
	if !known {
		return fmt.Errorf("there is no snippet for %q", kind)
	}
	for _, part := range []string{e.Server, e.ID, e.Token} {
		if strings.ContainsFunc(part, unsafe) {
			return fmt.Errorf("%q %w", part, ErrUnsafe)
		}
	}
	flags, variables := e.settings()
	indented := strings.ReplaceAll(variables, "ORGKEYS_", "      ORGKEYS_") // as the lines of the file in YAML
	_, err := strings.NewReplacer("{server}", e.Server, "{id}", e.ID, "{token}", e.Token,
		"{needs}", e.needs(), "{flags}", flags, "{variables}", variables, "{indented}", indented).WriteString(w, text)
	return err
}

func unsafe(c rune) bool {
	return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("-._~:/[]", c))
}

// A shell reads what is in parentheses whole before it runs any of it, and their set
// and exit end that alone. Pasted without, a failure would end the shell of the
// node, and the one before it, of another machine, would run the rest. Nothing is
// indented: in some terminals a tab asks for a completion.
const shellSnippet = `# On the node, as the user that orgkeys-node runs as. Enrollment {id}
(
set -eu
: "${IP:?the address of the node}" "${REGION:?its region}"
DIR=${DIR:-/var/lib/orgkeys-node}
install -d -m 0700 "$DIR"
(umask 077 && cat >"$DIR/enroll.token") <<'TOKEN'
{token}
TOKEN
orgkeys-node boot --server '{server}' --ip "$IP" --region "$REGION" --dir "$DIR" --token-file "$DIR/enroll.token"{flags}
)
`

// cloudSnippet is examples/cloud-init.yaml with a token in it.
const cloudSnippet = `#cloud-config
# Enrollment {id}. The image has orgkeys-node, its unit and its timer. Whatever runs
# on the machine can read this; the token is worth nothing any more once the node has its key.
{needs}users:
  - default
  - name: orgkeys-node
    system: true
    homedir: /nonexistent
    no_create_home: true
    shell: /usr/sbin/nologin

write_files:
  - path: /etc/orgkeys-node/env
    permissions: "0644"
    content: |
      ORGKEYS_NODE_SERVER={server}
      ORGKEYS_NODE_IP=ADDRESS
      ORGKEYS_NODE_REGION=REGION
      ORGKEYS_NODE_TOKEN_FILE=/var/lib/orgkeys-node/enroll.token
{indented}  - path: /var/lib/orgkeys-node/enroll.token
    owner: orgkeys-node:orgkeys-node
    permissions: "0600"
    defer: true # until the user is there
    content: {token}

runcmd:
  - [systemctl, enable, orgkeys-node.service]
  - [systemctl, --no-block, start, orgkeys-node.service]
  - [systemctl, --no-block, enable, --now, orgkeys-node-refresh.timer]
`

const systemdSnippet = `# As root on the node, where orgkeys-node.service is installed. It takes the credential
# orgkeys-node.token (systemd 252 and newer). Enrollment {id}
{needs}(
set -eu
: "${IP:?the address of the node}" "${REGION:?its region}"
install -d -m 0700 /etc/credstore
(umask 077 && cat >/etc/credstore/orgkeys-node.token) <<'TOKEN'
{token}
TOKEN
install -d -m 0755 /etc/orgkeys-node
install -m 0644 /dev/stdin /etc/orgkeys-node/env <<ENV
ORGKEYS_NODE_SERVER={server}
ORGKEYS_NODE_IP=$IP
ORGKEYS_NODE_REGION=$REGION
{variables}ENV
systemctl enable orgkeys-node.service
systemctl restart orgkeys-node.service
rm /etc/credstore/orgkeys-node.token
)
`
