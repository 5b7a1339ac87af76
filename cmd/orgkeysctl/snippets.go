package main

import (
	"errors"
	"io"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/snippet"
)

// printSnippet prints how to bring a token to a machine.
type printSnippet func(w io.Writer, server string, minted *client.MintedPermission) error

// snippets are the forms of --for; without it there is none.
var snippets = map[string]printSnippet{"": nil, "shell": written("shell"), "cloud-init": written("cloud-init"), "systemd": written("systemd")}

func written(kind string) printSnippet {
	return func(w io.Writer, server string, minted *client.MintedPermission) error {
		err := snippet.Write(w, kind, snippet.Enrollment{
			Server: server, ID: minted.ID, Token: string(minted.Token), OwnKey: minted.Origin == "node", TPM: minted.Bind.InTPM(),
		})
		if errors.Is(err, snippet.ErrUnsafe) {
			return &failure{exit: exitUsage, what: "the server's address or the enrollment's ID " + snippet.ErrUnsafe.Error(), hint: "use --token-out"}
		}
		return err
	}
}
