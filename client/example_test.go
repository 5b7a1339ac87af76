package client_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/orgkeys/orgkeys/client"
)

// token asks the identity provider for an administrator's token. Here it is the
// development issuer of the server that the examples run against.
func token(context.Context) (string, error) { return server.DevelopmentToken("acme", "OWNER") }

// An administrator has a key made and stores a boot secret; a node uses both.
func Example() {
	ctx := context.Background()
	admin, err := client.New(client.Config{Server: server.API, Token: token})
	if err != nil {
		log.Fatal(err)
	}
	generated, err := admin.GenerateKey(ctx, "acme")
	if err != nil {
		log.Fatal(err)
	}
	if err := admin.PutSecret(ctx, "acme", "env_s3", []byte("S3_BUCKET=b")); err != nil {
		log.Fatal(err)
	}

	key, err := client.ParsePrivateKey(generated.PEM)
	if err != nil {
		log.Fatal(err)
	}
	clear(generated.PEM)
	c, err := client.New(client.Config{Server: server.API, Retry: client.Retry{For: time.Minute}})
	if err != nil {
		log.Fatal(err)
	}
	node := client.Node{Client: c, Org: "acme", IP: "192.0.2.7", Region: "eu", Key: key}
	secrets, err := node.Secrets(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, s := range secrets {
		fmt.Printf("%s has %d bytes\n", s.Name, len(s.Value))
		clear(s.Value)
	}
	if err := node.Register(ctx, client.Registration{Version: "1.0", Status: "active"}); err != nil {
		log.Fatal(err)
	}

	nodes, err := admin.Nodes(ctx, "acme")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("registered:", nodes[0].IP, nodes[0].Status)
	// Output:
	// env_s3 has 11 bytes
	// registered: 192.0.2.7 active
}

// What to do about an error follows from its kind.
func ExampleCode() {
	c, err := client.New(client.Config{Server: server.API, Token: token})
	if err != nil {
		log.Fatal(err)
	}
	_, err = c.Keys(context.Background(), "globex")

	var foreign *client.ForeignError
	switch {
	case errors.Is(err, client.OtherOrganization):
		fmt.Println("the token is for another organization")
	case errors.As(err, &foreign):
		fmt.Println("this is not orgkeys:", foreign.Problem)
	case client.Temporary(err):
		fmt.Println("try again later")
	}
	// Output: the token is for another organization
}

// Retry also repeats what is not a call of the API.
func ExampleRetry_Do() {
	attempts := 0
	retry := client.Retry{
		For:     time.Minute,
		Waiting: func(err error, _ time.Duration) { fmt.Println("waiting:", err) },
	}
	err := retry.Do(context.Background(), func(context.Context) error {
		if attempts++; attempts < 2 {
			return errors.New("the disk is not mounted yet")
		}
		return nil
	})
	fmt.Println("after", attempts, "attempts:", err)
	// Output:
	// waiting: the disk is not mounted yet
	// after 2 attempts: <nil>
}

// A node fetches a key of its own with a one-time token. What it must store
// durably, and when, is in the comments.
func ExampleEnrollment() {
	ctx := context.Background()
	admin, err := client.New(client.Config{Server: server.API, Token: token})
	if err != nil {
		log.Fatal(err)
	}
	minted, err := admin.CreateEnrollment(ctx, "acme", client.Terms{Note: "rack 12"})
	if err != nil {
		log.Fatal(err)
	}

	// On the node:
	c, err := client.New(client.Config{Server: server.API, Retry: client.Retry{For: time.Minute}})
	if err != nil {
		log.Fatal(err)
	}
	recipient, err := client.NewRecipient() // stored before Fetch
	if err != nil {
		log.Fatal(err)
	}
	enrollment, err := client.NewEnrollment(c, minted.Token, recipient)
	if err != nil {
		log.Fatal(err)
	}
	defer enrollment.Close()
	delivered, err := enrollment.Fetch(ctx)
	if err != nil {
		log.Fatal(err)
	}
	key, err := client.ParsePrivateKey(delivered.PEM) // stored, with delivered.Delivery, before Receipt
	if err != nil {
		log.Fatal(err)
	}
	clear(delivered.PEM)
	if err := c.Receipt(ctx, delivered.Delivery, key); err != nil {
		log.Fatal(err)
	}
	// The recipient and the token are of no use any more.

	node := client.Node{Client: c, Org: delivered.Org, IP: "192.0.2.8", Region: "eu", Key: key, KeyID: delivered.KeyID}
	if err := node.Register(ctx, client.Registration{Version: "1.0", Status: "active"}); err != nil {
		log.Fatal(err)
	}
	fmt.Println("a key of", delivered.Org)

	_, err = enrollment.Fetch(ctx)
	fmt.Println("again:", errors.Is(err, client.EnrollmentClosed))
	// Output:
	// a key of acme
	// again: true
}

// An administrator has a key made that nobody in between can read.
func ExampleClient_SealedKey() {
	ctx := context.Background()
	admin, err := client.New(client.Config{Server: server.API, Token: token})
	if err != nil {
		log.Fatal(err)
	}
	recipient, err := client.NewRecipient() // stored before SealedKey
	if err != nil {
		log.Fatal(err)
	}
	delivered, err := admin.SealedKey(ctx, "acme", recipient)
	if err != nil {
		log.Fatal(err)
	}
	key, err := client.ParsePrivateKey(delivered.PEM) // stored before Receipt
	if err != nil {
		log.Fatal(err)
	}
	clear(delivered.PEM)
	if err := admin.Receipt(ctx, delivered.Delivery, key); err != nil {
		log.Fatal(err)
	}
	fmt.Println("the key that was vouched for:", client.Fingerprint(key.Public()) == delivered.Fingerprint)
	// Output: the key that was vouched for: true
}
