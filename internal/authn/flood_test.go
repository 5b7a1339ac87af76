package authn

import (
	"context"
	"errors"
	"testing"
	"time"
)

// TestAStrangerCostsNoGoodTokenItsRotation: whoever uses up the readings for tokens that
// do not verify makes nobody's good token a bad one whose key has an ID of its own.
func TestAStrangerCostsNoGoodTokenItsRotation(t *testing.T) {
	for name, kids := range map[string][2]string{
		"the key ID came back":        {"other", "key"},
		"a stranger asks for another": {"key", "new"},
	} {
		t.Run(name, func(t *testing.T) {
			onAClock(t, func(t *testing.T, s *scriptedSource, k *KeySet) {
				publish := func(by *signer) {
					key := by.jwk()
					if by.kid == "" {
						delete(key, "kid")
					}
					set := jwks(key)
					s.set.Store(&set)
				}
				token := func(by *signer) token {
					header := `{"alg":"ES256","kid":"` + by.kid + `"}`
					if by.kid == "" {
						header = `{"alg":"ES256"}`
					}
					return must(parseToken(sign(by.key, "ES256", header, goodClaims(nil))))
				}
				verify := func(by *signer) error { return k.verify(context.Background(), token(by)) }

				if name == "the key ID came back" {
					publish(newSigner("key"))
					if err := k.Read(t.Context()); err != nil {
						t.Fatal(err)
					}
					time.Sleep(time.Second)
				}
				old, fresh := newSigner(kids[0]), newSigner(kids[1])
				publish(old)
				if err := k.Read(t.Context()); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute)
				flood := func() {
					for range unknownBurst + 1 {
						time.Sleep(10 * time.Millisecond)
						if err := verify(newSigner(kids[0])); err == nil {
							t.Fatal("a stranger's token is accepted")
						}
						_ = verify(newSigner(kids[1]))
					}
				}
				flood()
				publish(fresh)
				time.Sleep(time.Millisecond)
				err := verify(fresh)
				if unsure, ok := errors.AsType[*UnsureError](err); !ok || !errors.Is(err, ErrKeysUnavailable) || errors.Is(err, ErrUnauthenticated) ||
					unsure.Refusal.Reason != ReasonSignature && unsure.Refusal.Reason != ReasonUnknownKey {
					t.Errorf("a good token by a key that cannot be looked for: %v, want ErrKeysUnavailable", err)
				}
				time.Sleep(30 * time.Second) // one reading is granted, and a stranger may come first
				flood()
				if err := verify(fresh); err != nil {
					t.Errorf("after the interval: %v", err)
				}
				// The set is newer than the key that it lacks, so the holder has to log in again.
				for range 3 {
					if err := verify(old); !errors.Is(err, ErrUnauthenticated) {
						t.Errorf("a token by the replaced key: %v, want a refusal", err)
					}
				}
			})
		})
	}
}

// TestASetThatWasReadMeanwhileIsLookedAt: the reading that another request had done, after
// this one looked, is not left out.
func TestASetThatWasReadMeanwhileIsLookedAt(t *testing.T) {
	onAClock(t, func(t *testing.T, _ *scriptedSource, k *KeySet) {
		if err := k.Read(t.Context()); err != nil {
			t.Fatal(err)
		}
		_, seen, err := k.current()
		if err != nil {
			t.Fatal(err)
		}
		called := time.Now()
		time.Sleep(time.Second)
		if err := k.Read(t.Context()); err != nil {
			t.Fatal(err)
		}
		if again, err := k.readSince(t.Context(), called, seen, &k.mismatched); !again || err != nil {
			t.Errorf("%v, %v: it would be judged by a set of before the call", again, err)
		}
	})
}
