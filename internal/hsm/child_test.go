//go:build cgo

package hsm

import "fmt"

func runChild(name string) error {
	return fmt.Errorf("no such child: %s", name)
}
