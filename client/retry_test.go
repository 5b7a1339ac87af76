package client_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/orgkeys/orgkeys/client"
)

var errPassing = errors.New("connection refused")

func TestPausesGrowUpToABound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var pauses []time.Duration
		r := client.Retry{For: 10 * time.Minute, Waiting: func(_ error, pause time.Duration) { pauses = append(pauses, pause) }}
		begun := time.Now()
		err := r.Do(t.Context(), func(context.Context) error { return errPassing })
		if took := time.Since(begun); !errors.Is(err, errPassing) || took != 10*time.Minute {
			t.Errorf("%v after %s", err, took)
		}
		expected := 500 * time.Millisecond
		for i, p := range pauses[:len(pauses)-1] {
			if p < expected/2 || p > expected*3/2 {
				t.Errorf("pause %d is %s, want about %s", i, p, expected)
			}
			expected = min(2*expected, 15*time.Second)
		}
	})
}

func TestRetryAfterIsWaitedForAndTheLastAttemptIsAtTheEnd(t *testing.T) {
	for asked, want := range map[time.Duration]time.Duration{20 * time.Second: 20 * time.Second, time.Hour: time.Minute} {
		for _, err := range []error{
			&client.Error{Status: 503, Code: client.Overloaded, RetryAfter: asked},
			&client.ForeignError{Status: 503, RetryAfter: asked},
		} {
			synctest.Test(t, func(t *testing.T) {
				var second time.Duration
				begun, attempts := time.Now(), 0
				client.Retry{For: time.Minute}.Do(t.Context(), func(context.Context) error {
					if attempts++; attempts == 2 {
						second = time.Since(begun)
						return nil
					}
					return err
				})
				if second < want || second > want+time.Second {
					t.Errorf("asked for %s: second attempt after %s", asked, second)
				}
			})
		}
	}
}

func TestWhatIsFinalIsNotRepeated(t *testing.T) {
	for _, err := range []error{
		&client.Error{Status: 400, Code: client.BadSignature}, &client.Error{Status: 403, Code: client.AccessDenied},
		&client.Error{Status: 404, Code: client.NodeNotFound}, &client.Error{Status: 400, Code: "a_code_of_a_newer_server"},
	} {
		attempts := 0
		got := client.Retry{For: client.Forever}.Do(t.Context(), func(context.Context) error { attempts++; return err })
		if !errors.Is(got, err) || attempts != 1 {
			t.Errorf("%v: %d attempts, %v", err, attempts, got)
		}
	}
}

func TestWhatPassesIsRepeated(t *testing.T) {
	for _, err := range []error{
		errPassing, context.DeadlineExceeded, &client.ForeignError{Status: 403},
		&client.Error{Status: 400, Code: client.StaleTimestamp}, &client.Error{Status: 400, Code: client.SignatureReused},
		&client.Error{Status: 400, Code: client.TLSRequired}, &client.Error{Status: 400, Code: client.BodyUnreadable},
		&client.Error{Status: 400, Code: client.InvalidRequest, ClockOffset: -time.Hour},
		&client.Error{Status: 408, Code: client.RequestTimeout}, &client.Error{Status: 429, Code: client.TooManyFailures},
		&client.Error{Status: 500, Code: client.SecretBroken}, &client.Error{Status: 503, Code: client.Draining},
	} {
		synctest.Test(t, func(t *testing.T) {
			attempts := 0
			if got := (client.Retry{For: client.Forever}).Do(t.Context(), func(context.Context) error {
				if attempts++; attempts < 50 {
					return err
				}
				return nil
			}); got != nil || attempts != 50 {
				t.Errorf("%v: %d attempts, %v", err, attempts, got)
			}
		})
	}
}

func TestPauseEndsWithTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Minute, cancel)
		begun := time.Now()
		err := client.Retry{For: client.Forever}.Do(ctx, func(context.Context) error { return errPassing })
		if !errors.Is(err, context.Canceled) || !errors.Is(err, errPassing) || time.Since(begun) != time.Minute {
			t.Errorf("%v after %s", err, time.Since(begun))
		}
	})
}
