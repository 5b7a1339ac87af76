package jsonbody

import (
	"regexp"
	"strconv"
	"strings"
	"time"
)

var (
	epochForm = regexp.MustCompile(`^(?:[0-9]{10}|[0-9]{13})$`)
	// RFC 3339, section 5.6: T and Z may be in lower case, and the offset is not optional.
	dateForm = regexp.MustCompile(`^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?(?:[Zz]|[+-][0-9]{2}:[0-9]{2})$`)
)

// ParseTimestamp reads epoch seconds (10 digits), epoch milliseconds (13
// digits), or RFC 3339 with an offset.
func ParseTimestamp(text string) (time.Time, bool) {
	if epochForm.MatchString(text) {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return time.Time{}, false
		}
		if len(text) == 10 {
			return time.Unix(n, 0), true
		}
		return time.UnixMilli(n), true
	}
	if !dateForm.MatchString(text) {
		return time.Time{}, false
	}
	t, err := time.Parse(time.RFC3339Nano, strings.ToUpper(text))
	return t, err == nil
}
