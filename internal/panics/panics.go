// Package panics logs a recovered panic without secrets.
package panics

import (
	"errors"
	"log/slog"
	"runtime"
	"runtime/debug"
)

// Log logs a recovered panic, with its stack, as an error. Its value is shown
// only if the runtime made it: others may hold anything, a key too. It is called
// from the deferred function that recovered.
func Log(log *slog.Logger, recovered any, attrs ...any) {
	stack := debug.Stack()
	if e, ok := recovered.(Elsewhere); ok {
		recovered, stack = e.value, e.stack
	}
	attrs = append(attrs, "stack", string(stack))
	if bug, ok := recovered.(runtime.Error); ok {
		attrs = append(attrs, "panic", bug.Error())
	}
	log.Error("panic", attrs...)
}

// Elsewhere is a panic that was recovered in the goroutine which did something for
// another one, for that one to panic with.
type Elsewhere struct {
	value any
	stack []byte
}

// Moved returns what the other goroutine panics with. It is called from the deferred
// function that recovered.
func Moved(recovered any) Elsewhere { return Elsewhere{recovered, debug.Stack()} }

// ErrBug is a panic, which the log describes.
var ErrBug = errors.New("a bug in the program")

// Caught does something in a goroutine other than a request's, where a panic would end the
// process: it becomes an error.
func Caught(log *slog.Logger, do func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			Log(log, v)
			err = ErrBug
		}
	}()
	return do()
}
