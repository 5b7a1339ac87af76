package api

import (
	"mime"
	"net/http"
	"regexp"
	"strconv"
	"strings"
)

// form is how the private key is written.
type form int

const (
	pemFile    form = iota // the PEM itself
	jsonString             // the PEM as one JSON string
)

func (f form) mediaType() string {
	if f == jsonString {
		return "application/json"
	}
	return "application/x-pem-file"
}

// maxAccept bounds the work on an Accept header, in bytes. Browsers send
// about 150.
const maxAccept = 4 << 10

// negotiate chooses the form by RFC 9110, section 12.5.1: the quality of a
// form is that of the most specific range that covers it. Between equal
// qualities the form that was named more specifically wins, then the PEM,
// except that a fetch which accepts anything gets the JSON string
// (Sec-Fetch-Mode: only implementations of fetch set it). Ranges that are not
// well-formed count as absent, and so do parameters other than q. No header,
// or an empty one, accepts anything.
func negotiate(h http.Header) (f form, ok bool) {
	accept := strings.Join(h.Values("Accept"), ",")
	if len(accept) > maxAccept {
		return 0, false
	}
	if strings.Trim(accept, ", \t") == "" {
		accept = "*/*"
	}
	var asPEM, asJSON preference
	for _, element := range splitQuoted(accept) {
		mediaRange, q, ok := parseRange(element)
		if !ok {
			continue
		}
		asPEM.consider(mediaRange, q, pemFile.mediaType())
		asJSON.consider(mediaRange, q, jsonString.mediaType())
	}
	switch {
	case asPEM.q == 0 && asJSON.q == 0:
		return 0, false
	case asPEM.q != asJSON.q:
		return choose(asJSON.q > asPEM.q), true
	case asPEM.specificity != asJSON.specificity:
		return choose(asJSON.specificity > asPEM.specificity), true
	default:
		fetched := len(h.Values("Sec-Fetch-Mode")) > 0
		return choose(fetched && asPEM.specificity == anything), true
	}
}

// namesSealed reports whether the sealed form is accepted by its name.
func namesSealed(h http.Header) bool {
	accept := strings.Join(h.Values("Accept"), ",")
	if len(accept) > maxAccept {
		return false
	}
	for _, element := range splitQuoted(accept) {
		if mediaRange, q, ok := parseRange(element); ok && q > 0 && mediaRange == sealedForm {
			return true
		}
	}
	return false
}

func choose(asJSON bool) form {
	if asJSON {
		return jsonString
	}
	return pemFile
}

// How specifically a range covers a form.
const (
	anything = 1 + iota // */*
	anySubtype
	exact
)

// preference is what a client thinks of one form.
type preference struct {
	specificity int
	q           int // thousandths
}

// consider takes a range into account. Of two that cover the form equally
// specifically, the higher quality counts.
func (p *preference) consider(mediaRange string, q int, mediaType string) {
	var s int
	switch mediaRange {
	case mediaType:
		s = exact
	case "application/*":
		s = anySubtype
	case "*/*":
		s = anything
	default:
		return
	}
	if s > p.specificity || s == p.specificity && q > p.q {
		p.specificity, p.q = s, q
	}
}

// qvalue is RFC 9110, section 12.4.2, and ".2", which older Java sends in every
// request.
var qvalue = regexp.MustCompile(`^(?:0(?:\.[0-9]{0,3})?|\.[0-9]{1,3}|1(?:\.0{0,3})?)$`)

func parseRange(element string) (mediaRange string, q int, ok bool) {
	mediaRange, parameters, err := mime.ParseMediaType(element)
	if err != nil {
		return "", 0, false
	}
	weight, weighted := parameters["q"]
	if !weighted {
		return mediaRange, 1000, true
	}
	if !qvalue.MatchString(weight) {
		return "", 0, false
	}
	value, err := strconv.ParseFloat(strings.TrimSuffix(weight, "."), 64)
	return mediaRange, int(value*1000 + 0.5), err == nil
}

// splitQuoted splits a list at the commas outside of quoted strings.
func splitQuoted(list string) []string {
	var elements []string
	start, quoted := 0, false
	for i := 0; i < len(list); i++ {
		switch c := list[i]; {
		case c == '\\' && quoted:
			i++
		case c == '"':
			quoted = !quoted
		case c == ',' && !quoted:
			elements = append(elements, list[start:i])
			start = i + 1
		}
	}
	return append(elements, list[start:])
}
