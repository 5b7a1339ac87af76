// Command nocgo opens a SQLite database in a binary without cgo, and prints the error.
package main

import (
	"context"
	"fmt"

	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func main() {
	_, err := sqlstore.Open(context.Background(), "orgkeys.db")
	fmt.Println(err)
}
