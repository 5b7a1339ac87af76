package e2e

import (
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// sorted puts a comma-separated list into one order.
func sorted(list string) string {
	if list == "" {
		return ""
	}
	items := strings.Split(strings.ReplaceAll(list, " ", ""), ",")
	slices.Sort(items)
	return strings.Join(items, ", ")
}

func readAll(t *testing.T, resp *http.Response) string {
	t.Helper()
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
