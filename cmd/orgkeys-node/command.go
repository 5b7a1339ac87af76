package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/orgkeys/orgkeys/internal/version"
)

// command is one of the things that orgkeys-node does.
type command struct {
	name  string
	help  string   // one line
	about string   // for its own --help
	flags []string // that it uses; the others are accepted and ignored
	needs needs
	// Whether it makes one attempt only, whatever --wait says, because a person watches.
	once  bool
	steps []step
}

// needs are the settings that a command must have.
type needs struct {
	server bool // --server
	node   bool // who the node is
	sealed bool // --sealed-file and --key-file
}

var (
	serverFlags = []string{"server", "ca-file", "tls-cert", "tls-key"}
	nodeFlags   = []string{"org", "ip", "region", "key-file"}
	keyFlags    = []string{"origin", "tpm"}
	reportFlags = []string{"version", "status", "url", "provider", "services"}
	runFlags    = []string{"config", "wait", "json"}
)

func commands() []command {
	return []command{
		{
			name: "boot", help: "fetch the key if there is a token for it, then the secrets into --dir, then register; safe to run again",
			about: `It does what is missing, and may be interrupted and run again at any point.

With a key that an administrator handed out:
  orgkeys-node boot --server https://orgkeys.example --org acme --ip 192.0.2.7 --region eu --key-file key.pem

With an enrollment token in place of a key (docs/enrollment.md): the node makes
a key pair of its own, asks with the token, and gets a private key that only this
pair can open. It lands in --dir (or where --key-file says), and the token file
is removed. The organization comes with the key.
  orgkeys-node boot --server https://orgkeys.example --ip 192.0.2.7 --region eu --token-file token

With --origin node the node makes the key itself, and only its public half leaves
it; with --tpm the private key stays in the TPM (docs/nodes.md).

A unit with LoadCredential=orgkeys-node.token:FILE needs no --token-file. A token
beside a key that was enrolled with another one fetches a new key; if it is refused,
the node goes on with the key that it has, and says so at the end.`,
			flags: slices.Concat(serverFlags, nodeFlags, []string{"token-file", "recipient-file", "dir"}, keyFlags, reportFlags, runFlags),
			needs: needs{server: true, node: true}, steps: []step{enroll, asNode(fetch), asNode(register)},
		},
		{
			name: "enroll", help: "only fetch the key with --token-file",
			about: `The first step of boot, alone. Running it again does no harm: the same token gets
the same key until the node has signed for it, and afterwards there is nothing to do.
  orgkeys-node enroll --server https://orgkeys.example --token-file token --key-file key.pem

Beside the key file it keeps what it needs to go on after an interruption:
  key.pem.recipient   the private key that opens the answer, or with --origin node
                      becomes the node's; removed at the end
  key.pem.enrollment  the key's ID and organization; stays, and is no secret`,
			flags: slices.Concat(serverFlags, []string{"token-file", "key-file", "recipient-file", "dir", "org"}, keyFlags, runFlags),
			needs: needs{server: true}, steps: []step{mustEnroll},
		},
		{
			name: "secrets", help: "only fetch the secrets",
			flags: slices.Concat(serverFlags, nodeFlags, []string{"dir", "tpm"}, runFlags),
			needs: needs{server: true, node: true}, steps: []step{asNode(fetch)},
		},
		{
			name: "register", help: "only register",
			flags: slices.Concat(serverFlags, nodeFlags, []string{"dir", "tpm"}, reportFlags, runFlags),
			needs: needs{server: true, node: true}, steps: []step{asNode(register)},
		},
		{
			name: "unregister", help: "take the node out of its organization",
			flags: slices.Concat(serverFlags, nodeFlags, []string{"dir", "tpm"}, runFlags),
			needs: needs{server: true, node: true}, steps: []step{asNode(unregister)},
		},
		{
			name: "status", help: "show what is there and whether the server answers, once; signs nothing",
			about: `It says how far the node's key is, which secrets are there, whether an orgkeys
server answers, and how far this node's clock is from its own.
  orgkeys-node status --server https://orgkeys.example --json`,
			flags: slices.Concat(serverFlags, []string{"key-file", "token-file", "recipient-file", "dir", "tpm"}, runFlags),
			needs: needs{server: true}, once: true, steps: []step{status},
		},
		{
			name: "ek", help: "show which TPM this machine has, for an administrator to allow",
			about: `It prints the name of the TPM's endorsement key: the one word that
  orgkeysctl device allow …
takes, and an enrollment's "bind":{"ek":…}. It changes nothing in the TPM, and asks
no server.
  orgkeys-node ek --tpm /dev/tpmrm0`,
			flags: []string{"tpm", "json", "config"},
			once:  true, steps: []step{ek},
		},
		{
			name: "recipient", help: "make the key pair that something is sealed to, and show its public half",
			about: `For administrators: what the server seals to this public key, only the private key in
--recipient-file opens. Running it again shows the same one.
  orgkeys-node recipient --recipient-file recipient.pem > public.pem

For a node before it enrolls, so that its token can be bound to it ("bind", with
the recipient's ID, which standard error shows).`,
			flags: slices.Concat([]string{"recipient-file", "key-file", "dir", "json", "config"}, keyFlags),
			once:  true, steps: []step{recipient},
		},
		{
			name: "unseal", help: "open a sealed key that an administrator had made",
			about: `It opens the answer to POST /organization/ORG/key with Accept:
application/vnd.orgkeys.sealed+json, and writes the private key to --key-file,
PEM, 0600. It asks no server. It overwrites no other key.
  orgkeys-node recipient --recipient-file recipient.pem > public.pem
  jq -n --rawfile recipient public.pem '{recipient: $recipient}' |
    curl … -H 'Accept: application/vnd.orgkeys.sealed+json' --data @- …/organization/acme/key > sealed.json
  orgkeys-node unseal --sealed-file sealed.json --recipient-file recipient.pem --key-file key.pem --receipt-file receipt.json

If the status is 202, the key is not ready yet: send the same again.

The receipt, sent to POST /organization/ORG/key/ID/receipt, has the server delete
its sealed copy.`,
			flags: []string{"sealed-file", "recipient-file", "key-file", "receipt-file", "tpm", "json", "config"},
			needs: needs{sealed: true}, once: true, steps: []step{unseal},
		},
	}
}

// find is the command of a name, or nil.
func find(name string) *command {
	for _, c := range commands() {
		if c.name == name {
			return &c
		}
	}
	return nil
}

// Commands that print and do nothing.
const (
	helpCommand       = "help"
	completionCommand = "completion"
	versionCommand    = "version"
)

func commandNames() []string {
	var names []string
	for _, c := range commands() {
		names = append(names, c.name)
	}
	return append(names, completionCommand, versionCommand, helpCommand)
}

// errNoAnswer: the words name no command that only prints.
var errNoAnswer = errors.New("not a command that only prints")

// answer does what a command that only prints has to do.
func answer(args []string, out io.Writer) error {
	first, rest := args[0], args[1:]
	asksForHelp := len(rest) == 1 && (rest[0] == "-h" || rest[0] == "--help" || rest[0] == "-help")
	switch first {
	case helpCommand, "-h", "--help", "-help":
		return helpAbout(rest, out)
	case versionCommand, "--version", "-version":
		if asksForHelp {
			return write(out, "orgkeys-node version prints the version and how this program was built.\n")
		}
		if len(rest) > 0 {
			return usageError("%q is one argument too many", rest[0])
		}
		return write(out, version.Of("orgkeys-node")+"\n")
	case completionCommand:
		if asksForHelp {
			return write(out, completionHelp)
		}
		return completion(rest, out)
	}
	return errNoAnswer
}

func write(out io.Writer, text string) error {
	if _, err := io.WriteString(out, text); err != nil {
		return &failure{exitCannotWrite, "writing the answer", "", err}
	}
	return nil
}

func helpAbout(words []string, out io.Writer) error {
	switch {
	case len(words) == 0:
		printUsage(out)
		return nil
	case len(words) > 1:
		return usageError("%q is one argument too many", words[1])
	}
	switch words[0] {
	case helpCommand:
		return write(out, "orgkeys-node help [COMMAND] is orgkeys-node COMMAND --help.\n")
	case versionCommand, completionCommand:
		return answer([]string{words[0], "--help"}, out)
	}
	c := find(words[0])
	if c == nil {
		return usageError("there is no command %q%s", words[0], meant(words[0], commandNames()))
	}
	printHelp(out, *c)
	return nil
}

// meant asks whether the known word nearest to a misspelt one was meant; empty if none is near.
func meant(word string, known []string) string {
	best, fewest := "", math.MaxInt
	for _, k := range known {
		if n := changes(word, k); n < fewest {
			best, fewest = k, n
		}
	}
	if fewest > 2 {
		return ""
	}
	return fmt.Sprintf("; did you mean %s?", best)
}

const usage = `orgkeys-node fetches a bridge node's key and boot secrets, and registers the node.

Usage: orgkeys-node COMMAND [FLAGS]

Commands:
%s
"orgkeys-node COMMAND --help" says more about one, with examples.

A first boot with a token from an administrator, and any later one:
  orgkeys-node boot --server https://orgkeys.example --ip 192.0.2.7 --region eu --token-file token

Flags, or the environment variables in parentheses:
%s
%s`

const exitCodes = `Whatever may pass is waited for, for as long as --wait says: a server that
cannot be reached or answers nothing of its own, a wrong clock, a file that is
not there yet or not as it must be, a key that is being made or awaits an
administrator's approval. Standard error says what is waited for.

Exit codes:
  0   done
  64  a setting is missing or wrong
  65  done with the key that was there; the token beside it is refused
  69  the server cannot be reached or cannot serve now
  73  a file cannot be written
  75  the clock is off, the key or the TPM is not ready, or the run was interrupted
  76  something that is not orgkeys answers
  77  the server does not accept the key or the token, or refuses the request
  78  a key, token or certificate file, or the TPM, is not as it must be

64 and 77 end a run at once, 65 when all else is done, the others when --wait is over;
running again may help.
`

// The functions below ignore errors: nothing depends on the output of help.

func printUsage(w io.Writer) {
	var list strings.Builder
	for _, c := range commands() {
		fmt.Fprintf(&list, "  %-10s  %s\n", c.name, c.help)
	}
	fmt.Fprintf(&list, "  %-10s  %s\n", completionCommand, "print a script that completes commands and flags: bash, zsh or fish")
	fmt.Fprintf(&list, "  %-10s  %s\n", versionCommand, "print the version and how this program was built")
	_, _ = fmt.Fprintf(w, usage, list.String(), flagHelp(nil), exitCodes)
}

func printHelp(w io.Writer, c command) {
	about := ""
	if c.about != "" {
		about = c.about + "\n\n"
	}
	_, _ = fmt.Fprintf(w, "orgkeys-node %s: %s\n\n%sFlags, or the environment variables in parentheses:\n%s\n%s", c.name, c.help, about, flagHelp(c.flags), exitCodes)
}
