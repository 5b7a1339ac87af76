package authz

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/util"
)

// What a policy may consist of. A directory that holds more was not meant.
const (
	maxFiles = 200
	maxBytes = 4 << 20
)

// source is the files of a policy, by name: Rego, its tests and JSON data.
type source map[string][]byte

// readSource reads the policy's files from fsys. Names that begin with a dot are
// left out: Kubernetes keeps its versions of a mounted directory there, with
// links to the current one's files beside them.
func readSource(fsys fs.FS) (source, error) {
	files, size := source{}, int64(0)
	err := fs.WalkDir(fsys, ".", func(name string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case name == ".":
			return nil
		case strings.HasPrefix(entry.Name(), ".") && entry.IsDir():
			return fs.SkipDir
		case strings.HasPrefix(entry.Name(), ".") || entry.IsDir():
			return nil
		}
		wanted, err := isPolicyFile(name)
		if err != nil || !wanted {
			return err
		}
		content, err := readLimited(fsys, name, maxBytes-size)
		if err != nil {
			return err
		}
		files[name] = content
		size += int64(len(content))
		if len(files) > maxFiles {
			return fmt.Errorf("more than %d files", maxFiles)
		}
		return nil
	})
	return files, err
}

// isPolicyFile refuses what Open Policy Agent itself would read and we do not:
// a policy that silently lacks its data may decide otherwise than it was tested to.
// It refuses names, too, that no export of the audit log can have.
func isPolicyFile(name string) (bool, error) {
	ext := path.Ext(name)
	if (ext == ".rego" || ext == ".json") && strings.Contains(name, `\`) {
		return false, fmt.Errorf("%q: a backslash in a file's name, which leads elsewhere where an export of the audit log is unpacked", name)
	}
	switch ext {
	case ".rego":
		return true, nil
	case ".json":
		if path.Dir(name) != "." {
			return false, fmt.Errorf("%s: data files belong into the directory itself, not below it", name)
		}
		return true, nil
	case ".yaml", ".yml":
		return false, fmt.Errorf("%s: data files must be JSON", name)
	}
	return false, nil
}

func readLimited(fsys fs.FS, name string, limit int64) ([]byte, error) {
	file, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file", name)
	}
	content, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(content)) > limit {
		return nil, fmt.Errorf("%s: the policy's files are larger than %d bytes together", name, maxBytes)
	}
	return content, nil
}

// revision identifies the files: "sha256:" and the hex SHA-256 over each file's
// name and content in the order of the names, each preceded by its length in
// bytes as a big-endian 64-bit integer.
func (s source) revision() string {
	digest := sha256.New()
	field := func(b []byte) {
		digest.Write(binary.BigEndian.AppendUint64(nil, uint64(len(b))))
		digest.Write(b)
	}
	for _, name := range slices.Sorted(maps.Keys(s)) {
		field([]byte(name))
		field(s[name])
	}
	return "sha256:" + hex.EncodeToString(digest.Sum(nil))
}

// Revision is the revision of a policy that consists of these files, by name.
func Revision(files map[string][]byte) string { return source(files).revision() }

// modules parses the Rego files: those that decide, and those that test them.
func (s source) modules() (policy, tests map[string]*ast.Module, err error) {
	policy, tests = map[string]*ast.Module{}, map[string]*ast.Module{}
	for name, content := range s {
		if path.Ext(name) != ".rego" {
			continue
		}
		module, err := ast.ParseModuleWithOpts(name, string(content), ast.ParserOptions{RegoVersion: ast.RegoV1})
		if err != nil {
			return nil, nil, err
		}
		if strings.HasSuffix(name, "_test.rego") {
			tests[name] = module
		} else {
			policy[name] = module
		}
	}
	if len(policy) == 0 {
		return nil, nil, errors.New("no .rego file")
	}
	return policy, tests, nil
}

// data merges the JSON files, which must be objects without a name in common.
func (s source) data() (map[string]any, error) {
	data := map[string]any{}
	for _, name := range slices.Sorted(maps.Keys(s)) {
		if path.Ext(name) != ".json" {
			continue
		}
		var object map[string]any
		if err := util.UnmarshalJSON(s[name], &object); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		for key, value := range object {
			if _, taken := data[key]; taken {
				return nil, fmt.Errorf("%s: %q is in another data file too", name, key)
			}
			data[key] = value
		}
	}
	return data, nil
}
