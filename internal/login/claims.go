package login

import (
	"encoding/base64"
	"encoding/json"
	"math"
	"strconv"
	"strings"
	"time"
)

// Claims are what a token says, which nobody has verified: they are for people's
// eyes and for defaults. What counts is what the server makes of the token.
type Claims map[string]any

// ReadClaims reads an access token, or reports ErrOpaque.
func ReadClaims(token string) (Claims, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, ErrOpaque
	}
	var header, claims Claims
	for i, into := range []*Claims{&header, &claims} {
		text, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err != nil || json.Unmarshal(text, into) != nil || *into == nil {
			return nil, ErrOpaque
		}
	}
	return claims, nil
}

// Text is a claim that is one string, or a list of one; else it is empty.
func (c Claims) Text(name string) string {
	value := c[name]
	if list, ok := value.([]any); ok && len(list) == 1 {
		value = list[0]
	}
	text, _ := value.(string)
	return text
}

// seconds is a length of time, which some providers write as a text.
func (c Claims) seconds(name string) (time.Duration, bool) {
	number, ok := c[name].(float64)
	if text, isText := c[name].(string); isText {
		var err error
		number, err = strconv.ParseFloat(text, 64)
		ok = err == nil
	}
	if !ok || !(number > 0 && number <= math.MaxInt32) {
		return 0, false
	}
	return time.Duration(number) * time.Second, true
}

// Expires is when the token does, zero if it does not say.
func (c Claims) Expires() time.Time {
	seconds, ok := c["exp"].(float64)
	if !ok || seconds <= 0 || seconds > math.MaxInt32*100 {
		return time.Time{}
	}
	return time.Unix(int64(seconds), 0)
}
