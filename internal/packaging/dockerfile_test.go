package packaging

import (
	"debug/elf"
	"go/version"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/config"
)

// stage is a FROM of the Dockerfile and the instructions that follow it.
type stage struct {
	name, image  string
	instructions []instruction
}

type instruction struct{ name, arguments string }

var fromLine = regexp.MustCompile(`^(\S+) AS (\S+)$`)

func dockerfile(t *testing.T) []stage {
	t.Helper()
	text := regexp.MustCompile(`(?m)^\s*#.*\n`).ReplaceAllString(read(t, "Dockerfile"), "")
	text = strings.ReplaceAll(text, "\\\n", " ")
	var stages []stage
	for line := range strings.Lines(text) {
		name, arguments, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok {
			continue
		}
		if name == "FROM" {
			m := fromLine.FindStringSubmatch(arguments)
			if m == nil {
				t.Fatalf("a stage without a name: %q", line)
			}
			stages = append(stages, stage{name: m[2], image: m[1]})
			continue
		}
		if len(stages) == 0 {
			t.Fatalf("%q comes before any FROM", line)
		}
		s := &stages[len(stages)-1]
		s.instructions = append(s.instructions, instruction{name, strings.TrimSpace(arguments)})
	}
	if len(stages) == 0 {
		t.Fatal("the Dockerfile has no stages")
	}
	return stages
}

func (s stage) all(name string) []string {
	var arguments []string
	for _, i := range s.instructions {
		if i.name == name {
			arguments = append(arguments, i.arguments)
		}
	}
	return arguments
}

func (s stage) last(name string) string {
	if all := s.all(name); len(all) > 0 {
		return all[len(all)-1]
	}
	return ""
}

func TestImagesDoNotRunAsRoot(t *testing.T) {
	stages := dockerfile(t)
	for _, s := range stages {
		if s.last("ENTRYPOINT") == "" {
			continue // never run: built in, or copied from
		}
		if uid, _, _ := strings.Cut(s.last("USER"), ":"); !regexp.MustCompile(`^[1-9]\d*$`).MatchString(uid) {
			t.Errorf("%s runs as user %q; it should be a number other than 0", s.name, uid)
		}
	}
	last := stages[len(stages)-1]
	if last.name != "orgkeys" || last.last("ENTRYPOINT") != `["orgkeys"]` || last.last("CMD") != `["serve"]` {
		t.Errorf("the last stage is %q and runs %s %s", last.name, last.last("ENTRYPOINT"), last.last("CMD"))
	}
}

func TestImagesArePinned(t *testing.T) {
	pinned := regexp.MustCompile(`^[a-z/]+:(\d+\.\d+\.\d+(-bookworm)?|bookworm-\d{8}-slim)$`)
	for _, s := range dockerfile(t) {
		if !pinned.MatchString(s.image) {
			t.Errorf("%s is made from %q, which names no exact version", s.name, s.image)
		}
	}
}

func TestImageIsBuiltWithTheLanguageVersionOfGoMod(t *testing.T) {
	build := dockerfile(t)[0]
	tag := strings.TrimSuffix(strings.TrimPrefix(build.image, "golang:"), "-bookworm")
	image, module := "go"+tag, "go"+goMod(t, "go.mod").Go.Version
	if version.Lang(image) != version.Lang(module) || version.Compare(image, module) < 0 {
		t.Errorf("the image is built with %s; go.mod says %s", image, module)
	}
}

func TestWhatIsTestedIsBuiltLikeWhatShips(t *testing.T) {
	for file, command := range map[string]string{
		"Dockerfile":    `-trimpath -tags nomsgpack .*\./cmd/orgkeys\n`,
		"scripts/build": `-trimpath -tags nomsgpack .*\./cmd/orgkeys `,
		"scripts/test":  `GOFLAGS=.*-trimpath -tags=nomsgpack"`,
		"scripts/bench": `GOFLAGS="-trimpath -tags=nomsgpack"`,
	} {
		if !regexp.MustCompile(command).MatchString(read(t, file)) {
			t.Errorf("%s has no %s", file, command)
		}
	}
}

func TestImageCopiesWhatIsThere(t *testing.T) {
	ignore := strings.Fields(regexp.MustCompile(`(?m)^#.*$`).ReplaceAllString(read(t, ".dockerignore"), ""))
	if ignore[0] != "*" {
		t.Error(".dockerignore does not begin by leaving everything out")
	}
	admitted := strings.Join(ignore, " ") + " "
	for _, s := range dockerfile(t) {
		for _, arguments := range s.all("COPY") {
			if strings.HasPrefix(arguments, "--from=") {
				continue
			}
			sources := strings.Fields(arguments)
			for _, source := range sources[:len(sources)-1] {
				if _, err := os.Stat(filepath.Join(root, source)); err != nil {
					t.Errorf("%s: %v", s.name, err)
				}
				if !strings.Contains(admitted, "!"+source+" ") {
					t.Errorf("%s copies %s, which .dockerignore leaves out", s.name, source)
				}
			}
		}
	}
}

func TestImageSettingsAreKnown(t *testing.T) {
	stages := dockerfile(t)
	for _, env := range stages[len(stages)-1].all("ENV") {
		name, _, _ := strings.Cut(env, "=")
		known := false
		for _, s := range config.Settings() {
			known = known || s.Name == name
		}
		if !known {
			t.Errorf("the image sets %s, which is no setting", name)
		}
	}
}

// TestImageBuildWorksAsPlainSteps copies what the build stage copies, and
// nothing else, runs its commands, and starts the program as the image's user.
func TestImageBuildWorksAsPlainSteps(t *testing.T) {
	build, src, out := dockerfile(t)[0], t.TempDir(), t.TempDir()
	for _, arguments := range build.all("COPY") {
		paths := strings.Fields(arguments)
		for _, source := range paths[:len(paths)-1] {
			copyTree(t, filepath.Join(root, source), filepath.Join(src, source))
		}
	}
	commands := build.all("RUN")
	if len(commands) == 0 {
		t.Fatal("the build stage runs nothing")
	}
	for _, command := range commands {
		cmd := exec.Command("sh", "-ec", strings.ReplaceAll(command, "/out/", out+"/"))
		cmd.Dir = src
		cmd.Env = append(os.Environ(), "VERSION=v9.8.7")
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("RUN %s: %v\n%s", command, err, b)
		}
	}
	for _, argument := range []string{"version", "--version"} {
		b, err := exec.Command(filepath.Join(out, "orgkeys"), argument).CombinedOutput()
		if err != nil || !strings.HasPrefix(string(b), "orgkeys v9.8.7 ") {
			t.Errorf("orgkeys %s: %v\n%s", argument, err, b)
		}
	}
	staticAndSmall(t, filepath.Join(out, "orgkeys-node"), 10<<20)
	staticAndSmall(t, filepath.Join(out, "orgkeysctl"), 15<<20)
}

func TestBuildScriptBuildsAllPrograms(t *testing.T) {
	if b, err := exec.Command(filepath.Join(root, "scripts/build")).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	if b, err := exec.Command(filepath.Join(root, "bin/orgkeys"), "version").CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, b)
	}
	staticAndSmall(t, filepath.Join(root, "bin/orgkeys-node"), 10<<20)
	staticAndSmall(t, filepath.Join(root, "bin/orgkeysctl"), 15<<20)
}

// TestVaultBuildScriptStartsNothingByMistake: what it builds takes ten minutes.
func TestVaultBuildScriptStartsNothingByMistake(t *testing.T) {
	for argument, want := range map[string]int{"--help": 0, "--hlep": 2, "vault": 2} {
		cmd := exec.Command(filepath.Join(root, "vault/devserver/build"), argument)
		cmd.Env = append(os.Environ(), "ORGKEYS_CACHE="+t.TempDir(), "PATH=/usr/bin:/bin") // where no Go is
		b, _ := cmd.CombinedOutput()                                                       // the exit code says it
		if code := cmd.ProcessState.ExitCode(); code != want || !strings.HasPrefix(string(b), "Usage: ") {
			t.Errorf("%s: exit code %d\n%s", argument, code, b)
		}
	}
}

// staticAndSmall: what bridge nodes and administrators take from here runs on any
// Linux, whatever is or is not installed there, and has few megabytes.
func staticAndSmall(t *testing.T, path string, most int64) {
	t.Helper()
	if b, err := exec.Command(path, "help").CombinedOutput(); err != nil {
		t.Errorf("%s does not start: %v\n%s", path, err, b)
	}
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("%s is linked dynamically: it has %s", path, p.Type)
		}
	}
	if info, err := os.Stat(path); err != nil || info.Size() > most {
		t.Errorf("%s is not small: %d bytes, %v", path, info.Size(), err)
	}
}

func copyTree(t *testing.T, from, to string) {
	t.Helper()
	info, err := os.Stat(from)
	if err != nil {
		t.Fatal(err)
	}
	if info.IsDir() {
		err = os.CopyFS(to, os.DirFS(from))
	} else {
		var b []byte
		if b, err = fs.ReadFile(os.DirFS(filepath.Dir(from)), filepath.Base(from)); err == nil {
			err = os.WriteFile(to, b, 0o600)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}
