package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/orgkeys/orgkeys/client"
)

// snippet prints how to bring a token to a machine.
type snippet func(w io.Writer, server string, minted *client.MintedPermission) error

// snippets are the forms of --for; without it there is none.
var snippets = map[string]snippet{"": nil, "shell": written(shellSnippet), "cloud-init": written(cloudSnippet), "systemd": written(systemdSnippet)}

// written fills a snippet in. What goes in has none of the characters that
// shells, YAML or systemd care about: the token is base64url and hyphens, and the
// server's URL has been parsed and is escaped.
func written(text string) snippet {
	return func(w io.Writer, server string, minted *client.MintedPermission) error {
		for _, part := range []string{server, minted.ID} {
			if strings.ContainsFunc(part, unsafe) {
				return &failure{exit: exitUsage, what: fmt.Sprintf("%q cannot stand in a snippet", part), hint: "use --token-out"}
			}
		}
		_, err := strings.NewReplacer("{server}", server, "{id}", minted.ID, "{token}", string(minted.Token)).WriteString(w, text)
		return err
	}
}

func unsafe(c rune) bool {
	return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("-._~:/[]", c))
}

const shellSnippet = `# As root on the node; orgkeys-node is installed there. Enrollment {id}
set -eu
: "${IP:?the address of the node}" "${REGION:?its region}"
DIR=${DIR:-/etc/orgkeys-node}
install -d -m 0755 "$DIR"
(umask 077 && cat >"$DIR/token") <<'TOKEN'
{token}
TOKEN
orgkeys-node boot --server {server} --ip "$IP" --region "$REGION" --token-file "$DIR/token"
`

const cloudSnippet = `#cloud-config
# Enrollment {id}. Whoever can read the user data of the machine can read the token,
# until the node has used it.
write_files:
  - path: /etc/orgkeys-node/token
    permissions: "0600"
    content: |
      {token}
  - path: /etc/orgkeys-node/env
    permissions: "0644"
    content: |
      ORGKEYS_NODE_SERVER={server}
      ORGKEYS_NODE_IP=ADDRESS
      ORGKEYS_NODE_REGION=REGION
      ORGKEYS_NODE_TOKEN_FILE=/etc/orgkeys-node/token
runcmd:
  - [chown, "orgkeys-node:orgkeys-node", /etc/orgkeys-node/token]
  - [systemctl, enable, --now, orgkeys-node.service]
`

const systemdSnippet = `# As root on the node, with orgkeys-node.service installed, and the node's address and
# region in /etc/orgkeys-node/env. Enrollment {id}
set -eu
(umask 077 && install -d /etc/credstore.encrypted)
systemd-creds encrypt --name=orgkeys-token - /etc/credstore.encrypted/orgkeys-token <<'TOKEN'
{token}
TOKEN
install -d -m 0755 /etc/systemd/system/orgkeys-node.service.d
cat >/etc/systemd/system/orgkeys-node.service.d/token.conf <<'UNIT'
[Service]
LoadCredentialEncrypted=orgkeys-token
Environment=ORGKEYS_NODE_SERVER={server}
Environment=ORGKEYS_NODE_TOKEN_FILE=%d/orgkeys-token
UNIT
systemctl daemon-reload
systemctl restart orgkeys-node.service
`
