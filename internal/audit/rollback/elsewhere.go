package rollback

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// elsewhere goes through the sinks that hold the log back and belong to other replicas.
// Those that the operator gives up are lost, by an event each; those in left hold the log
// back still. ended: an event that was recorded now ends the halt for the others.
func (a *acceptance) elsewhere(ctx context.Context, ended bool) (lost bool, left []audit.AheadSink, err error) {
	for _, holder := range a.request.LostSinks {
		if !slices.ContainsFunc(a.ahead, func(s audit.AheadSink) bool { return s.Holder == holder }) {
			if _, err := fmt.Fprintf(a.out, "no sink of %s is known to be ahead of the log: --lost-sink has nothing to give up there\n", holder); err != nil {
				return lost, nil, err
			}
		}
	}
	for _, s := range a.ahead {
		switch {
		case a.isOwn(s):
			err = a.settled(ctx, s)
		case a.isLost(s):
			lost, err = true, a.giveUp(ctx, s)
		case ended:
			_, err = fmt.Fprintf(a.out, "%v: run this with its settings and data directory, too, before it starts\n", s)
		default:
			left = append(left, s)
		}
		if err != nil {
			return lost, nil, err
		}
	}
	return lost, left, nil
}

// isOwn reports whether a sink is one of the request's, which are compared with the log
// here. A host may have got another name, as each new container does.
func (a *acceptance) isOwn(s audit.AheadSink) bool {
	_, own, named := strings.Cut(a.request.Holder, ":")
	_, dir, _ := strings.Cut(s.Holder, ":")
	return named && dir == own && slices.ContainsFunc(a.request.Sinks, func(own audit.Sink) bool { return own.Name() == s.Sink })
}

func (a *acceptance) isLost(s audit.AheadSink) bool {
	return slices.Contains(a.request.LostSinks, s.Holder) && !a.isOwn(s)
}

// settled ends the halt because of a sink that the log extends now, or that starts over.
func (a *acceptance) settled(ctx context.Context, s audit.AheadSink) error {
	if a.request.DryRun {
		return nil
	}
	return a.store.ForgetAhead(ctx, s)
}

// giveUp accepts what a sink held that nobody can ask any more. Nothing but its size is
// known of it: the event says that the log keeps all that it has.
func (a *acceptance) giveUp(ctx context.Context, s audit.AheadSink) error {
	head, err := a.store.Head(ctx)
	if err != nil {
		return err
	}
	said := "accepted"
	if a.request.DryRun {
		said = "would be accepted"
	} else {
		e := audit.Rollback{From: head.Text(), To: head.Text(), Kept: head.Size, Reason: a.request.Reason}.Event()
		e.Detail["lostSink"], e.Detail["lostHolder"], e.Detail["lostSize"] = s.Sink, s.Holder, strconv.FormatInt(s.Size, 10)
		if err := a.acceptEvent(ctx, head, e, []audit.AheadSink{s}); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintf(a.out, "%s: the log continues from %d events without sink %s of %s, which held %d: events that only it held are lost, and nothing names them\n", said, head.Size, s.Sink, s.Holder, s.Size)
	return err
}

// heldBack says of sinks elsewhere how to go on; nil: there are none.
func heldBack(left []audit.AheadSink) error {
	if len(left) == 0 {
		return nil
	}
	all := make([]error, len(left))
	for i, s := range left {
		all[i] = fmt.Errorf("%v, since %s; %s", s, s.Found.Format(time.RFC3339), Remedy(s.Holder))
	}
	return fmt.Errorf("no event gets an index: %w", errors.Join(all...))
}

// Remedy says what to do about a sink of another replica that is ahead of the log.
func Remedy(holder string) string {
	return fmt.Sprintf(`if that data directory still exists, run "orgkeys audit accept-rollback" with it and its settings, which names what was lost; `+
		`if it is gone for good, add --lost-sink %s to the command on another replica: what only that sink held is lost then, and nothing names it`, word(holder))
}

// word is a holder as one word of a shell's command.
func word(holder string) string { return "'" + strings.ReplaceAll(holder, "'", `'\''`) + "'" }
