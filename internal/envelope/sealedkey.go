package envelope

// The algorithms of sealed keys, as Google Cloud KMS and AWS KMS name them.
const (
	WrapSHA256 = "RSA_AES_KEY_WRAP_SHA_256"
	WrapSHA1   = "RSA_AES_KEY_WRAP_SHA_1" // of modules that have no other, as SoftHSM 2.6.1
)

// SealedKey is a private key (PKCS#8 DER, RFC 5958) wrapped to a recipient: the
// bytes of PKCS#11's CKM_RSA_AES_KEY_WRAP, an AES-256 key under RSAES-OAEP
// (RFC 8017, 7.1; empty label, MGF1 with the same hash) followed by the private
// key under AES key wrap with padding (RFC 5649).
type SealedKey struct {
	Alg   string `json:"alg"` // WrapSHA256 or WrapSHA1
	Value []byte `json:"value"`
}
