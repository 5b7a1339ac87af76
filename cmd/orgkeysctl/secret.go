package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/privatefile"
)

const maxSecret = 64 << 10 // bytes that the server takes

func newSecret(s *settings) *cobra.Command {
	cmd := &cobra.Command{Use: "secret", Short: "Boot secrets: put, list, delete"}
	cmd.AddCommand(newSecretPut(s), newSecretList(s), newSecretDelete(s))
	return cmd
}

func newSecretPut(s *settings) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "put NAME", Short: "Store a boot secret from standard input or a file, in place of an older one",
		Long: `Stores a boot secret, which nodes fetch at first boot and nobody reads back here. Its
value is what standard input or --file holds, byte for byte (so mind a final line feed), up to 64 KiB.`,
		Example: `  printf %s "$VALUE" | orgkeysctl secret put env_s3
  orgkeysctl secret put tls_key --file key.pem`,
		Args: cobra.ExactArgs(1),
	}
	cmd.RunE = s.connected(func(ctx context.Context, c *connection, args []string) error {
		value, err := readSecret(file, cmd.InOrStdin(), c)
		if err != nil {
			return err
		}
		defer clear(value)
		if err := c.PutSecret(ctx, c.Org, args[0], value); err != nil {
			return err
		}
		return c.done("stored secret %s, %d bytes", args[0], len(value))
	})
	cmd.Flags().StringVar(&file, "file", "", "`file` with the value, which only its owner may read")
	return cmd
}

func readSecret(file string, in io.Reader, c *connection) ([]byte, error) {
	if file != "" {
		value, err := privatefile.Read(file, maxSecret, privatefile.Owner)
		if err != nil {
			return nil, &failure{exit: exitConfig, what: "--file", err: err}
		}
		return value, nil
	}
	if terminal(in) {
		c.progress("reading the value from the keyboard, where it shows; end it with Ctrl-D")
	}
	value := make([]byte, maxSecret+1)
	n, err := io.ReadFull(in, value)
	switch {
	case err == nil:
		clear(value)
		return nil, usage("standard input holds more than %d bytes", maxSecret)
	case n == 0:
		return nil, usage("standard input holds no value")
	case err != io.ErrUnexpectedEOF:
		clear(value)
		return nil, &failure{exit: exitConfig, what: "standard input", err: err}
	}
	return value[:n], nil
}

// terminal reports whether what is read comes from a person's keyboard.
func terminal(in io.Reader) bool {
	f, ok := in.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

func newSecretList(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the organization's boot secrets, without their values", Args: cobra.NoArgs,
		RunE: s.connected(func(ctx context.Context, c *connection, _ []string) error {
			secrets, err := c.StoredSecrets(ctx, c.Org)
			if err != nil {
				return err
			}
			if c.json {
				return printJSON(c.out, secrets)
			}
			var rows [][]string
			for _, s := range secrets {
				rows = append(rows, []string{s.Name, instant(s.Created), instant(s.Updated)})
			}
			return table(c.out, []string{"NAME", "CREATED", "UPDATED"}, rows, "no secrets")
		}),
	}
}

func newSecretDelete(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "delete NAME...", Short: "Delete boot secrets: nodes remove them the next time they fetch", Args: cobra.MinimumNArgs(1),
		RunE: s.connected(func(ctx context.Context, c *connection, args []string) error {
			for _, name := range args {
				if err := c.DeleteSecret(ctx, c.Org, name); err != nil {
					return fmt.Errorf("secret %s: %w", name, err)
				}
				if err := c.done("deleted secret %s", name); err != nil {
					return err
				}
			}
			return nil
		}),
	}
}
