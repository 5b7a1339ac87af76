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

const shellSnippet = `# On the node, as the user that orgkeys-node runs as. Enrollment {id}
set -eu
: "${IP:?the address of the node}" "${REGION:?its region}"
DIR=${DIR:-/var/lib/orgkeys-node}
install -d -m 0700 "$DIR"
(umask 077 && cat >"$DIR/token") <<'TOKEN'
{token}
TOKEN
orgkeys-node boot --server {server} --ip "$IP" --region "$REGION" --dir "$DIR" --token-file "$DIR/token"
`

// cloudSnippet is examples/cloud-init.yaml with a token in it.
const cloudSnippet = `#cloud-config
# Enrollment {id}. The image has orgkeys-node and its unit. Whatever runs on the
# machine can read this; the token is worth nothing any more once the node has its key.
users:
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
      ORGKEYS_NODE_TOKEN_FILE=/var/lib/orgkeys-node/token
  - path: /var/lib/orgkeys-node/token
    owner: orgkeys-node:orgkeys-node
    permissions: "0600"
    defer: true # until the user is there
    content: {token}

runcmd:
  - [systemctl, enable, --now, orgkeys-node.service]
`

const systemdSnippet = `# As root on the node, where orgkeys-node.service is installed. It takes the credential
# orgkeys-node.token (systemd 252 and newer). Enrollment {id}
set -eu
: "${IP:?the address of the node}" "${REGION:?its region}"
install -d -m 0700 /etc/credstore
(umask 077 && cat >/etc/credstore/orgkeys-node.token) <<'TOKEN'
{token}
TOKEN
install -d -m 0755 /etc/orgkeys-node
cat >/etc/orgkeys-node/env <<ENV
ORGKEYS_NODE_SERVER={server}
ORGKEYS_NODE_IP=$IP
ORGKEYS_NODE_REGION=$REGION
ENV
systemctl enable orgkeys-node.service
systemctl restart orgkeys-node.service
rm /etc/credstore/orgkeys-node.token
`
