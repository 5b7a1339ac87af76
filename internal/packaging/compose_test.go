// Package packaging tests what ships around the code: the scripts, the
// container image and its composition, the workflow, and the documents that
// name dependencies. Containers cannot run everywhere, so what they would run
// is run here as plain processes.
package packaging

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"

	"github.com/orgkeys/orgkeys/internal/config"
)

// root is the top of the repository.
const root = "../.."

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// deployment is docker-compose.yml, loaded for secrets that were made for it.
type deployment struct {
	*types.Project
	dir string
}

func deploy(t *testing.T) deployment {
	t.Helper()
	dir := t.TempDir()
	makeSecrets(t, dir)
	options, err := cli.NewProjectOptions([]string{filepath.Join(root, "docker-compose.yml")},
		cli.WithEnvFiles(filepath.Join(dir, "env")), cli.WithDotEnv,
		cli.WithEnv([]string{"ORGKEYS_ISSUER=https://issuer.example", "ORGKEYS_AUDIENCE=orgkeys", "ORGKEYS_CLAIM_ORG=/a/b", "ORGKEYS_ROLE_MAP=a=OWNER"}))
	if err != nil {
		t.Fatal(err)
	}
	project, err := options.LoadProject(t.Context())
	if err != nil {
		t.Fatalf("loading docker-compose.yml: %v", err)
	}
	if len(project.Services) == 0 || len(project.Secrets) == 0 {
		t.Fatalf("docker-compose.yml has %d services and %d secrets", len(project.Services), len(project.Secrets))
	}
	return deployment{project, dir}
}

func makeSecrets(t *testing.T, dir string) {
	t.Helper()
	if out, err := exec.Command(filepath.Join(root, "scripts/compose-secrets"), dir).CombinedOutput(); err != nil {
		t.Fatalf("making the secrets: %v\n%s", err, out)
	}
}

func TestCompose(t *testing.T) {
	d := deploy(t)
	for name, check := range map[string]func(*testing.T, deployment){
		"every service is confined":                         servicesAreConfined,
		"images name a version or a stage of ours":          imagesArePinned,
		"a stopping server gets its time":                   stoppingTakesItsTime,
		"health is checked and waited for":                  healthIsChecked,
		"back ends are on an internal network":              backEndsAreInternal,
		"secrets are private files that the script makes":   secretsAreFiles,
		"the service accepts its settings":                  settingsAreAccepted,
		"secrets that are there stay as they are":           secretsStay,
		"certificates are for their services and of one CA": certificatesVerify,
	} {
		t.Run(name, func(t *testing.T) { check(t, d) })
	}
}

func servicesAreConfined(t *testing.T, d deployment) {
	for name, s := range d.Services {
		if uid, _, _ := strings.Cut(s.User, ":"); uid == "" || uid == "0" || uid == "root" {
			t.Errorf("%s runs as user %q", name, s.User)
		}
		if !s.ReadOnly {
			t.Errorf("%s: its root file system is writable", name)
		}
		if !slices.Equal(s.CapDrop, []string{"ALL"}) || len(s.CapAdd) != 0 {
			t.Errorf("%s drops capabilities %q and adds %q", name, s.CapDrop, s.CapAdd)
		}
		if !slices.Contains(s.SecurityOpt, "no-new-privileges:true") {
			t.Errorf("%s may gain privileges", name)
		}
		if s.Privileged || s.NetworkMode == "host" || s.Pid != "" || s.Ipc != "" || len(s.Devices) != 0 || s.UseAPISocket {
			t.Errorf("%s shares something of the host", name)
		}
		for _, p := range s.Ports {
			if ip := net.ParseIP(p.HostIP); ip == nil || !ip.IsLoopback() {
				t.Errorf("%s: port %d is published on %q, beyond loopback", name, p.Target, p.HostIP)
			}
		}
	}
}

func imagesArePinned(t *testing.T, d deployment) {
	version := regexp.MustCompile(`:\d+\.\d+(\.\d+)?(-[a-z0-9]+)?$`)
	for name, s := range d.Services {
		switch {
		case s.Build != nil:
			if s.Image != "" || s.Build.Target == "" || !strings.Contains(read(t, "Dockerfile"), " AS "+s.Build.Target+"\n") {
				t.Errorf("%s: image %q and stage %q of the Dockerfile", name, s.Image, s.Build.Target)
			}
		case !version.MatchString(s.Image):
			t.Errorf("%s: image %q names no version", name, s.Image)
		}
	}
}

func healthIsChecked(t *testing.T, d deployment) {
	for _, name := range []string{"vault", "postgres", "redis"} {
		if h := d.Services[name].HealthCheck; h == nil || len(h.Test) < 2 {
			t.Errorf("%s has no health check", name)
		}
	}
	if !strings.Contains(read(t, "Dockerfile"), "\nHEALTHCHECK ") {
		t.Error("orgkeys has none: its image should bring one")
	}
	want := map[string]string{"postgres": "service_healthy", "redis": "service_healthy", "vault-setup": "service_completed_successfully"}
	for name, condition := range want {
		if got := d.Services["orgkeys"].DependsOn[name].Condition; got != condition {
			t.Errorf("orgkeys waits for %s by %q, want %q", name, got, condition)
		}
	}
}

func stoppingTakesItsTime(t *testing.T, d deployment) {
	given := d.Services["orgkeys"].StopGracePeriod
	if needed := timeToStop(t); given == nil || time.Duration(*given) <= needed {
		t.Errorf("orgkeys is killed after %v; it may take %s to stop", given, needed)
	}
}

func backEndsAreInternal(t *testing.T, d deployment) {
	if !d.Networks["backend"].Internal {
		t.Error("the network backend is not internal")
	}
	for name, s := range d.Services {
		if name == "orgkeys" {
			continue
		}
		if _, ok := s.Networks["backend"]; !ok || len(s.Networks) != 1 {
			t.Errorf("%s is on networks %v", name, s.Networks)
		}
		if len(s.Ports) != 0 {
			t.Errorf("%s publishes ports", name)
		}
	}
}

func secretsAreFiles(t *testing.T, d deployment) {
	for name, s := range d.Secrets {
		if s.File == "" || s.Content != "" || s.Environment != "" {
			t.Errorf("secret %s is not a file", name)
			continue
		}
		info, err := os.Stat(s.File)
		if err != nil {
			t.Errorf("secret %s: %v", name, err)
			continue
		}
		if !strings.HasPrefix(s.File, d.dir) || info.Mode().Perm() != 0o600 || info.Size() == 0 {
			t.Errorf("secret %s: %s, mode %04o, %d bytes", name, s.File, info.Mode().Perm(), info.Size())
		}
	}
	for name, s := range d.Services {
		for _, v := range s.Volumes {
			info, err := os.Stat(v.Source)
			if err != nil || strings.HasPrefix(v.Source, d.dir) && info.Mode() != os.ModeDir|0o700 {
				t.Errorf("%s mounts %s, which is not there or not private (error: %v)", name, v.Source, err)
			}
		}
		for variable, value := range s.Environment {
			if strings.HasSuffix(variable, "PASSWORD") || value != nil && strings.Contains(*value, "@") {
				t.Errorf("%s: %s looks like a secret in the environment", name, variable)
			}
		}
	}
}

func secretsStay(t *testing.T, d deployment) {
	before := map[string]string{}
	for name, s := range d.Secrets {
		b, err := os.ReadFile(s.File)
		if err != nil {
			t.Fatal(err)
		}
		before[name] = string(b)
	}
	makeSecrets(t, d.dir)
	for name, s := range d.Secrets {
		if b, err := os.ReadFile(s.File); err != nil || string(b) != before[name] {
			t.Errorf("secret %s changed (error: %v)", name, err)
		}
	}
}

func certificatesVerify(t *testing.T, d deployment) {
	for _, name := range []string{"vault", "postgres", "redis", "orgkeys"} {
		out, err := exec.Command("openssl", "verify", "-CAfile", d.Secrets["ca_cert"].File,
			"-verify_hostname", name, "-purpose", "sslserver", d.Secrets[name+"_cert"].File).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

// inContainer matches the paths at which containers find what is mounted.
var inContainer = regexp.MustCompile(`/run/secrets/[a-z_]+|/var/lib/approle`)

// onHost replaces a container's paths by those of what is mounted there.
func (d deployment) onHost(s string) string {
	return inContainer.ReplaceAllStringFunc(s, func(path string) string {
		if name, ok := strings.CutPrefix(path, "/run/secrets/"); ok {
			return d.Secrets[name].File
		}
		return filepath.Join(d.dir, filepath.Base(path))
	})
}

// ofTheComposition are settings that the composition itself decides, and says so.
var ofTheComposition = map[string]bool{
	"ORGKEYS_ADMIN_LISTEN": true, "ORGKEYS_DATA_DIR": true, "ORGKEYS_AUDIT_SINKS": true, "ORGKEYS_AUDIT_FILE": true,
	"ORGKEYS_VAULT_AUTH": true, "ORGKEYS_VAULT_SECRET_ID_PATH": true, "ORGKEYS_VAULT_TOKEN_FILE": true,
	"ORGKEYS_TLS_BY_PROXY": true,
}

func settingsAreAccepted(t *testing.T, d deployment) {
	given := map[string]bool{}
	for _, s := range d.Services["orgkeys"].Secrets {
		given["/run/secrets/"+s.Source] = true
	}
	var environ []string
	for name, value := range d.Services["orgkeys"].Environment {
		if value == nil {
			continue // passed on only where it is set
		}
		if strings.HasPrefix(*value, "/run/secrets/") && !given[*value] {
			t.Errorf("orgkeys uses %s without being given it", *value)
		}
		environ = append(environ, name+"="+d.onHost(*value))
	}
	c, err := config.Load(environ, "")
	if err != nil {
		t.Fatalf("the service refuses what docker-compose.yml sets: %v", err)
	}
	if c.ClaimOrg != "/a/b" || c.RoleMap != "a=OWNER" {
		t.Errorf("what is set where docker compose runs is not passed on: %+v", c)
	}
	text := read(t, "docker-compose.yml")
	for _, s := range config.Settings() {
		if ofTheComposition[s.Name] && !regexp.MustCompile(`\b`+s.Name+`\b`).MatchString(text) {
			t.Errorf("docker-compose.yml does not say that %s is its own", s.Name)
		}
		_, passed := d.Services["orgkeys"].Environment[s.Name]
		_, asFile := d.Services["orgkeys"].Environment[s.Name+"_FILE"]
		if !passed && !asFile && !ofTheComposition[s.Name] && !strings.HasPrefix(s.Name, "ORGKEYS_PKCS11_") {
			t.Errorf("docker-compose.yml does not pass %s on", s.Name)
		}
	}
	if c.Keystore != config.KeystoreVault || c.DatabaseURL == "" || c.RedisURL == "" || c.TLSCertFile == "" || c.Development() {
		t.Error("docker-compose.yml does not configure the back ends of production")
	}
}
