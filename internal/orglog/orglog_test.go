package orglog

import (
	"errors"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/jsonbody"
)

func TestQueries(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 25, 4, 26, 31, 0, time.UTC)
	for query, want := range map[string]Filter{
		"": {Take: usualTake},
		"type=orgkey.created&type=node.deleted&object=x&actor=u-7&from=2026-11-25T04:26:31Z&until=1764044791&before=7&take=1000": {
			Types: []string{"orgkey.created", "node.deleted"}, Object: "x", Actor: "u-7", From: at, Until: time.Unix(1764044791, 0), Before: 7, Take: 1000},
	} {
		if got, err := parse(query); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q is read as %+v, %v", query, got, err)
		}
	}
	for _, bad := range []string{
		"%zz", "a=1", "type=", "type=x", "type=DROP.TABLE", strings.Repeat("type=a.b&", maxTypes+1), "take=0", "take=1001", "take=x", "take=1&take=2",
		"before=0", "before=-1", "before=x", "from=yesterday", "from=", "until=2026", "object=", "actor=" + url.QueryEscape("a\x00b"), "object=" + strings.Repeat("x", 257),
		url.QueryEscape("<script>") + "=1",
	} {
		_, err := parse(bad)
		wrong, ok := errors.AsType[*jsonbody.Error](err)
		if !ok || strings.Contains(wrong.Error(), "<") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
