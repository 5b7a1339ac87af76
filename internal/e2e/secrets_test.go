package e2e

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// TestSlowReadersOfSecretsTakeBoundedMemory: an organization may have 4 MiB of
// secrets, and clients that fetch them and do not read the answer. However many
// they are, the server's memory has a bound, and another organization's node is
// served.
func TestSlowReadersOfSecretsTakeBoundedMemory(t *testing.T) {
	const slow, bound = 100, 320 << 10 // clients; KiB more than at rest
	s := harness.Start(t)
	large, small := harness.Org(), harness.Org()
	largeKey, smallKey := s.Generate(t, large), s.Generate(t, small)
	value := bytes.Repeat([]byte("x"), 64<<10)
	for i := range 64 {
		putSecret(t, s, large, fmt.Sprintf("s%d", i), value)
	}
	putSecret(t, s, small, "env_s3", []byte("A=1"))
	before := resident(t, s.PID())

	body := secretsRequest(t, large, "192.0.2.1", largeKey.Private)
	for range slow {
		connection, err := net.Dial("tcp", strings.TrimPrefix(s.API, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer connection.Close()
		connection.(*net.TCPConn).SetReadBuffer(4096)
		fmt.Fprintf(connection, "POST /secrets HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
	ask := func() {
		t.Helper()
		resp := s.Do(t, harness.Request{
			Method: "POST", Path: "/secrets", Body: secretsRequest(t, small, "192.0.2.2", smallKey.Private),
			Header: http.Header{"Content-Type": {"application/json"}},
		})
		if resp.Status != http.StatusOK || !bytes.Contains(resp.Body, []byte("env_s3_enc")) {
			t.Errorf("another organization's node: status %d, %.200s", resp.Status, resp.Body)
		}
	}
	most := int64(0)
	for began := time.Now(); time.Since(began) < 8*time.Second; {
		ask()
		most = max(most, resident(t, s.PID())-before)
	}
	t.Logf("%d slow readers took %d MiB more", slow, most>>10)
	if most > bound {
		t.Errorf("%d slow readers took %d MiB more, the bound is %d MiB", slow, most>>10, bound>>10)
	}
}

func putSecret(t *testing.T, s *harness.Server, org, name string, value []byte) {
	t.Helper()
	s.Do(t, harness.Request{
		Method: "PUT", Path: "/organization/" + org + "/secret/" + name, Token: s.Token(t, org, "OWNER"), Body: value,
		Header: http.Header{"Content-Type": {"application/octet-stream"}},
	}).Want(t, http.StatusOK, "Secret stored successfully")
}

// secretsRequest is a signed body of POST /secrets.
func secretsRequest(t *testing.T, org, ip string, key *rsa.PrivateKey) []byte {
	t.Helper()
	at := strconv.FormatInt(time.Now().UnixMilli(), 10)
	digest := sha256.Sum256([]byte(ip + "|eu|" + at))
	signature, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	body, err := json.Marshal(map[string]string{
		"ip": ip, "region": "eu", "timestamp": at, "id_org": org, "signature": base64.StdEncoding.EncodeToString(signature),
	})
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// resident is a process's resident memory in KiB.
func resident(t *testing.T, pid int) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kib
}
