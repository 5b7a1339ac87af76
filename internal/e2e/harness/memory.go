package harness

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// Memory is a copy of the server's whole memory, taken while it is stopped: every
// page there is of every mapping that can be read.
func (s *Server) Memory(t testing.TB) []byte {
	t.Helper()
	pid := s.PID()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(pid, syscall.SIGCONT)
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	var memory []byte
	read := 0
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		// The kernel's own pages, and what the process itself may not read.
		if mode[0] != 'r' || strings.Contains(line, "[vvar") || strings.Contains(line, "[vsyscall]") {
			continue
		}
		if memory, err = appendMapping(memory, pid, int64(from), int64(to)); err != nil {
			t.Fatalf("reading the server's memory: %q: %v", line, err)
		}
		read++
	}
	if read == 0 || len(memory) == 0 {
		t.Fatalf("nothing of the server's memory could be read:\n%s", maps)
	}
	return memory
}

const pageSize = 4096

// appendMapping appends the pages of one mapping that are in memory, or swapped out.
func appendMapping(memory []byte, pid int, from, to int64) ([]byte, error) {
	pages, err := readPrivate(fmt.Sprintf("/proc/%d/pagemap", pid), from/pageSize*8, to/pageSize*8)
	if err != nil {
		return nil, err
	}
	there := func(page int64) bool { return len(pages) >= int(page+1)*8 && pages[page*8+7]&0xC0 != 0 }
	for page, n := int64(0), (to-from)/pageSize; page < n; page++ {
		first := page
		for page < n && there(page) {
			page++
		}
		if page == first {
			continue
		}
		b, err := readPrivate(fmt.Sprintf("/proc/%d/mem", pid), from+first*pageSize, from+page*pageSize)
		if err != nil {
			return nil, err
		}
		memory = append(memory, b...)
	}
	return memory, nil
}

// readPrivate reads part of a file of a process that is not dumpable: the kernel
// gives it to root alone.
func readPrivate(name string, from, to int64) ([]byte, error) {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrPermission) {
		return privileged("dd", "status=none", "bs=1M", "iflag=skip_bytes,count_bytes", "if="+name, fmt.Sprintf("skip=%d", from), fmt.Sprintf("count=%d", to-from)).Output()
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, to-from)
	_, err = f.ReadAt(b, from)
	return b, err
}

// AddPrivate adds the numbers of a private key as memory could hold them: big
// endian as in DER, little endian as math/big and crypto/rsa keep them, and as
// lines of PEM, PKCS#1 and PKCS#8.
func (sc *Scanner) AddPrivate(name string, k *rsa.PrivateKey) {
	k.Precompute()
	for number, n := range map[string]*big.Int{
		"d": k.D, "p": k.Primes[0], "q": k.Primes[1], "dP": k.Precomputed.Dp, "dQ": k.Precomputed.Dq, "qInv": k.Precomputed.Qinv,
	} {
		sc.AddSecret(name+" "+number, n.Bytes())
		little := n.Bytes()
		slices.Reverse(little)
		for _, p := range pieces(little) {
			sc.forms = append(sc.forms, form{name + " " + number + " in little endian", p, false})
		}
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		panic(err) // an RSA key that was parsed before
	}
	for typ, der := range map[string][]byte{"RSA PRIVATE KEY": x509.MarshalPKCS1PrivateKey(k), "PRIVATE KEY": pkcs8} {
		lines := bytes.Split(bytes.TrimSpace(pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})), []byte("\n"))
		const width = 48 // bytes in a line
		secret := bytes.Index(der, k.D.Bytes())/width + 1
		for _, line := range lines[1+secret : len(lines)-2] {
			sc.forms = append(sc.forms, form{name + " in PEM", line, false})
		}
	}
}

// AddAESKey adds an AES key, which also begins its own key schedule, whole or by
// halves, in the order of its bytes or of 32-bit words.
func (sc *Scanner) AddAESKey(name string, key []byte) {
	words := slices.Clone(key)
	for w := range slices.Chunk(words, 4) {
		slices.Reverse(w)
	}
	half := len(key) / 2
	for _, k := range [][]byte{key[:half], key[half:]} {
		sc.AddSecret(name, k)
	}
	for _, k := range [][]byte{words[:half], words[half:]} {
		sc.forms = append(sc.forms, form{name + " in words", k, false})
	}
}

// filterBits is the size of the filter that most places of the memory fail.
const filterBits = 21

// ScanMemory is Scan in one pass for any number of secrets. It sees no text that
// is broken by line ends.
//
// The race detector would look at each of some billion reads; nothing writes to b.
//
//go:norace
func (sc *Scanner) ScanMemory(b []byte) []string {
	const head = 8 // bytes by which a form is looked up
	slot := func(x uint32) uint32 { return x * 2654435761 >> (32 - filterBits) }
	filter := make([]bool, 1<<filterBits)
	byHead := map[uint64][]form{}
	for _, f := range sc.forms {
		filter[slot(binary.LittleEndian.Uint32(f.want))] = true
		at := binary.LittleEndian.Uint64(f.want[:head])
		byHead[at] = append(byHead[at], f)
	}
	var found []string
	for i := range max(0, len(b)-head+1) {
		if !filter[slot(binary.LittleEndian.Uint32(b[i:]))] {
			continue
		}
		for _, f := range byHead[binary.LittleEndian.Uint64(b[i:])] {
			if bytes.HasPrefix(b[i:], f.want) {
				found = append(found, f.name)
			}
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}
