package tiles

import "testing"

// The paths that the specification gives as examples, and their neighbours.
func TestPaths(t *testing.T) {
	for want, got := range map[string]string{
		"tile/0/x001/x234/067":       tilePath(0, 1234067, width),
		"tile/0/x001/x234/067.p/8":   tilePath(0, 1234067, 8),
		"tile/3/000":                 tilePath(3, 0, width),
		"tile/1/999.p/255":           tilePath(1, 999, 255),
		"tile/entries/x001/000":      bundlePath(1000, width),
		"tile/entries/x001/x000/000": bundlePath(1000000, width),
	} {
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}
