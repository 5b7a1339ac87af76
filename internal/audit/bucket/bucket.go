// Package bucket keeps the archive of the log in an S3-compatible store.
package bucket

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/orgkeys/orgkeys/internal/audit/tiles"
)

// Limits of a request.
const (
	connectTimeout = 5 * time.Second
	headerTimeout  = 15 * time.Second
	callTimeout    = 60 * time.Second // a whole call, with its repetitions
	attempts       = 4                // that the client makes, with pauses that double
	idleTimeout    = 60 * time.Second
	conflicts      = 5                      // after which a write that another one hinders fails
	conflictPause  = 100 * time.Millisecond // doubles
	connections    = 16
	maxFile        = 256 * (1<<16 + 1) // the largest entry bundle
)

// Config is where a bucket is, and who asks.
type Config struct {
	Endpoint  string // https://host:port
	Region    string
	CAFile    string // certificate authorities; empty: the system's
	AccessKey string
	SecretKey string
	Place     string // s3://BUCKET/PREFIX
}

// Bucket is a tiles.Store.
type Bucket struct {
	client *minio.Client
	bucket string
	prefix string // empty, or ends with a slash
}

var _ tiles.Store = (*Bucket)(nil)

// IsPlace reports whether an archive's place is in a bucket.
func IsPlace(place string) bool { return strings.HasPrefix(place, "s3://") }

// New returns the store that c describes, without asking it.
func New(c Config) (*Bucket, error) {
	bucket, prefix, _ := strings.Cut(strings.TrimPrefix(c.Place, "s3://"), "/")
	if prefix != "" {
		prefix = strings.Trim(prefix, "/") + "/"
	}
	if bucket == "" || prefix == "/" || path.Clean("/"+prefix) != "/"+strings.TrimSuffix(prefix, "/") {
		return nil, fmt.Errorf("%q is not a place such as s3://bucket/prefix", c.Place)
	}
	at, err := url.Parse(c.Endpoint)
	if err != nil || at.Host == "" || at.Path != "" || at.RawQuery != "" || at.User != nil || at.Scheme != "https" && at.Scheme != "http" {
		return nil, errors.New("the S3 endpoint is not an address such as https://s3.example.org")
	}
	if at.Scheme == "http" && !loopback(at.Hostname()) {
		return nil, errors.New("the S3 endpoint must be an https address: http is for loopback only")
	}
	roots, err := authorities(c.CAFile)
	if err != nil {
		return nil, err
	}
	client, err := minio.New(at.Host, &minio.Options{
		Creds: credentials.NewStaticV4(c.AccessKey, c.SecretKey, ""), Secure: at.Scheme == "https", Region: c.Region, MaxRetries: attempts,
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, DialContext: (&net.Dialer{Timeout: connectTimeout}).DialContext, TLSHandshakeTimeout: connectTimeout,
			ResponseHeaderTimeout: headerTimeout, IdleConnTimeout: idleTimeout, MaxConnsPerHost: connections, MaxIdleConnsPerHost: connections,
			DisableCompression: true, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots},
		},
	})
	if err != nil {
		return nil, fmt.Errorf("the S3 client: %w", err)
	}
	return &Bucket{client, bucket, prefix}, nil
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func authorities(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", file)
	}
	return roots, nil
}

func (b *Bucket) String() string { return "s3://" + b.bucket + "/" + strings.TrimSuffix(b.prefix, "/") }

// Read implements tiles.Store.
func (b *Bucket) Read(ctx context.Context, path string) ([]byte, error) {
	content, _, err := b.read(ctx, path)
	return content, err
}

func (b *Bucket) read(ctx context.Context, path string) (content []byte, etag string, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	object, err := b.client.GetObject(ctx, b.bucket, b.prefix+path, minio.GetObjectOptions{})
	if err != nil {
		return nil, "", b.explained(path, err)
	}
	defer object.Close() // it was read only
	content, err = io.ReadAll(io.LimitReader(object, maxFile+1))
	if err != nil {
		return nil, "", b.explained(path, err)
	}
	if len(content) > maxFile {
		return nil, "", fmt.Errorf("%s/%s is larger than orgkeys writes", b, path)
	}
	info, err := object.Stat()
	return content, info.ETag, b.explained(path, err)
}

// explained names the object, and makes one that is not there fs.ErrNotExist.
func (b *Bucket) explained(path string, err error) error {
	if err == nil {
		return nil
	}
	if minio.ToErrorResponse(err).Code == minio.NoSuchKey {
		err = fs.ErrNotExist
	}
	return fmt.Errorf("%s/%s: %w", b, path, err)
}

// put writes an object in one request: several parts would lose the condition.
func (b *Bucket) put(ctx context.Context, path string, content []byte, when func(*minio.PutObjectOptions)) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	options := minio.PutObjectOptions{ContentType: "application/octet-stream", DisableMultipart: true}
	when(&options)
	_, err := b.client.PutObject(ctx, b.bucket, b.prefix+path, bytes.NewReader(content), int64(len(content)), options)
	return err
}

// replace writes an object in place of before, nil: of nothing, and returns what is there then. An
// attempt that was refused (412) may have been a repetition of one that was not. S3 says 409
// where another write is under way, which may fail: then it is written again.
func (b *Bucket) replace(ctx context.Context, path string, before, content []byte, when func(*minio.PutObjectOptions)) ([]byte, error) {
	pause := conflictPause
	for n := 1; ; n++ {
		err := b.put(ctx, path, content, when)
		if err == nil {
			return content, nil
		}
		status := minio.ToErrorResponse(err).StatusCode
		if status != http.StatusPreconditionFailed && status != http.StatusConflict {
			return nil, b.explained(path, err)
		}
		held, reading := b.Read(ctx, path)
		unchanged := reading == nil && before != nil && bytes.Equal(held, before) || before == nil && errors.Is(reading, fs.ErrNotExist)
		if !unchanged {
			return held, reading
		}
		if n == conflicts {
			return nil, b.explained(path, err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		pause *= 2
	}
}

func ifNothing(o *minio.PutObjectOptions) { o.SetMatchETagExcept("*") }

// WriteOnce implements tiles.Store.
func (b *Bucket) WriteOnce(ctx context.Context, path string, content []byte) error {
	held, err := b.replace(ctx, path, nil, content, ifNothing)
	if err == nil && !bytes.Equal(held, content) {
		err = tiles.Changed(b.String() + "/" + path)
	}
	return err
}

// Flush implements tiles.Store: what S3 has acknowledged lasts.
func (*Bucket) Flush(context.Context) error { return nil }

// Replace implements tiles.Store.
func (b *Bucket) Replace(ctx context.Context, path string, before, content []byte) error {
	changed := fmt.Errorf("%s/%s was changed meanwhile: by another run, which has published the log, then run the command again; or by another log, or somebody who writes there", b, path)
	when := ifNothing
	if before != nil {
		held, etag, err := b.read(ctx, path)
		if err != nil {
			return err
		}
		if !bytes.Equal(held, before) {
			return changed
		}
		when = func(o *minio.PutObjectOptions) { o.SetMatchETag(etag) }
	}
	held, err := b.replace(ctx, path, before, content, when)
	if err == nil && !bytes.Equal(held, content) {
		err = changed
	}
	return err
}

// RemoveAll implements tiles.Store, for directories without further ones.
func (b *Bucket) RemoveAll(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	names := []string{b.prefix + path}
	for object := range b.client.ListObjectsIter(ctx, b.bucket, minio.ListObjectsOptions{Prefix: b.prefix + path + "/"}) {
		if object.Err != nil {
			return b.explained(path, object.Err)
		}
		names = append(names, object.Key)
	}
	for _, name := range names {
		if err := b.client.RemoveObject(ctx, b.bucket, name, minio.RemoveObjectOptions{}); err != nil {
			return b.explained(path, err)
		}
	}
	return nil
}

// Lock implements tiles.Store. A bucket has no locks: each write has its condition.
func (*Bucket) Lock(context.Context) (func() error, error) {
	return func() error { return nil }, nil
}
