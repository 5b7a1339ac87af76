package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/client"
)

const (
	pageSize  = 100   // events that the server gives at once
	maxEvents = 10000 // events of one list
)

func newEvent(s *settings) *cobra.Command {
	cmd := &cobra.Command{Use: "event", Short: "What changed in the organization: list"}
	cmd.AddCommand(newEventList(s))
	return cmd
}

func newEventList(s *settings) *cobra.Command {
	f := client.EventFilter{}
	var since, until string
	var limit int
	cmd := &cobra.Command{
		Use: "list", Short: "List changes of keys and nodes, newest first",
		Long: `Lists changes of keys and nodes, newest first: the organization's for its
administrators, for other members their own. Reads, denials and boot secrets are in the
audit log alone.`,
		Example: `  orgkeysctl event list --since 168h --of key --change deleted
  orgkeysctl event list --since 2026-03-01T00:00:00Z --json`,
		Args: cobra.NoArgs,
		RunE: s.connected(func(ctx context.Context, c *connection, _ []string) error {
			if err := checkFilter(&f, since, until, limit); err != nil {
				return err
			}
			events, more, err := fetchEvents(ctx, c, f, limit)
			if err != nil {
				return err
			}
			if more > 0 {
				defer c.warn("there are more: --limit")
			}
			if c.json {
				return printJSON(c.out, events)
			}
			return showEvents(c, events)
		}),
	}
	flags := cmd.Flags()
	flags.StringVar(&since, "since", "24h", "from then on: a `time` (RFC 3339) or how long ago")
	flags.StringVar(&until, "until", "", "up to then: a `time` (RFC 3339) or how long ago")
	flags.StringVar(&f.Context, "of", "", "only changes of this: key or node")
	flags.StringVar(&f.Change, "change", "", "only these: created, updated or deleted")
	flags.StringVar(&f.Object, "id", "", "only this key or node, by its `ID`")
	flags.StringVar(&f.By, "by", "", "only what this `subject` did")
	flags.BoolVar(&f.Unread, "unread", false, "only what you have not marked as read")
	flags.IntVar(&limit, "limit", pageSize, "`number` of events at most, up to 10000")
	return cmd
}

func checkFilter(f *client.EventFilter, since, until string, limit int) (err error) {
	if f.From, err = parseWhen(since); err != nil {
		return usage("--since: %w", err)
	}
	if f.To, err = parseWhen(until); err != nil {
		return usage("--until: %w", err)
	}
	if !slices.Contains([]string{"", client.OfKeys, client.OfNodes}, f.Context) {
		return usage("--of is key or node")
	}
	if !slices.Contains([]string{"", client.WasCreated, client.WasUpdated, client.WasDeleted}, f.Change) {
		return usage("--change is created, updated or deleted")
	}
	if limit < 1 || limit > maxEvents {
		return usage("--limit is 1 to %d", maxEvents)
	}
	return nil
}

// parseWhen reads a time, or how long ago it was; it is zero for an empty text.
func parseWhen(text string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if ago, err := time.ParseDuration(text); err == nil {
		return time.Now().Add(-ago).Truncate(time.Millisecond), nil
	}
	return time.Parse(time.RFC3339, text)
}

// fetchEvents reads pages until there are limit events or no more, and returns
// how many there are beyond. What comes about meanwhile moves the others to
// later places, so what was seen is passed over.
func fetchEvents(ctx context.Context, c *connection, f client.EventFilter, limit int) (events []client.Event, more int, err error) {
	events = []client.Event{}
	seen := map[int64]bool{}
	for {
		f.Take = pageSize
		page, err := c.Events(ctx, c.Org, f)
		if err != nil {
			return nil, 0, err
		}
		for _, e := range page.Events {
			if !seen[e.ID] && len(events) < limit {
				events = append(events, e)
				seen[e.ID] = true
			}
		}
		f.Skip += len(page.Events)
		if len(page.Events) == 0 || f.Skip >= page.Total || len(events) >= limit {
			return events, max(page.Total-len(events), 0), nil
		}
	}
}

func showEvents(c *connection, events []client.Event) error {
	var rows [][]string
	for _, e := range events {
		by := e.By
		if e.Name != "" || e.Email != "" {
			by = strings.TrimSpace(by + " " + e.Name + " " + e.Email)
		}
		rows = append(rows, []string{instant(e.Time), kindOf(e.Context), e.Change, e.Object, by})
	}
	return table(c.out, []string{"TIME", "OF", "CHANGE", "ID", "BY"}, rows, "no events")
}

// kindOf is what commands call what the API calls by the platform's names.
func kindOf(context string) string {
	switch context {
	case "orgkey":
		return client.OfKeys
	case "flashbacknode":
		return client.OfNodes
	}
	return context
}
