// Package version tells which build of orgkeys a program is.
package version

import (
	"cmp"
	"fmt"
	"runtime/debug"
	"strings"
)

// release is set by the linker where there is no repository to read it from, as in an image's build.
var release string

// Of returns the program's name and what it was built from: release, commit, cgo and Go version.
func Of(program string) string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return program + " (unknown build)"
	}
	setting := map[string]string{}
	for _, s := range info.Settings {
		setting[s.Key] = s.Value
	}
	return strings.Join(strings.Fields(fmt.Sprintf("%s %s %s cgo=%s %s",
		program, cmp.Or(release, info.Main.Version), setting["vcs.revision"], setting["CGO_ENABLED"], info.GoVersion)), " ")
}
