package jsonbody

import (
	"strconv"
	"strings"
	"testing"
)

// A timestamp in digits is the same time as those digits say, and no other text passes for one.
func FuzzTimestamp(f *testing.F) {
	for _, text := range []string{"1700000000", "1700000000123", "2023-11-14T22:13:20Z", "2023-11-14t22:13:20.5-23:59", "2023-02-30T00:00:00Z"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, ok := ParseTimestamp(text)
		if !ok {
			return
		}
		if strings.ContainsFunc(text, func(c rune) bool { return !strings.ContainsRune("0123456789TtZz:+-.", c) }) {
			t.Fatalf("%q passes", text)
		}
		if n, err := strconv.ParseInt(text, 10, 64); err == nil {
			if (len(text) == 10 && got.Unix() != n) || (len(text) == 13 && got.UnixMilli() != n) {
				t.Errorf("%q is %s", text, got)
			}
		}
	})
}
