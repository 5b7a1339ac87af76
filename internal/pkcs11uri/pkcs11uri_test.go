package pkcs11uri

import (
	"reflect"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	slot := uint(3)
	for text, want := range map[string]URI{
		"pkcs11:": {},
		"pkcs11:token=my%20token;object=seal;serial=DECC0401648": {Token: "my token", Object: "seal", Serial: "DECC0401648"},
		"pkcs11:manufacturer=SoftHSM%20project;model=SoftHSM%20v2;slot-id=3;id=%01%FF;type=secret-key": {
			Manufacturer: "SoftHSM project", Model: "SoftHSM v2", Slot: &slot, ID: "\x01\xff"},
		"pkcs11:token=t?pin-source=file:/etc/pin":                                            {Token: "t", PINFile: "/etc/pin"},
		"pkcs11:token=t?pin-source=/etc/pin":                                                 {Token: "t", PINFile: "/etc/pin"},
		"pkcs11:token=t?pin-source=file%3A///etc/a%2520b":                                    {Token: "t", PINFile: "/etc/a%20b"},
		"pkcs11:token=t?module-path=/usr/lib/x.so&pin-source=file:%2F%2Flocalhost%2Fetc%2Fp": {Token: "t", ModulePath: "/usr/lib/x.so", PINFile: "/etc/p"},
	} {
		got, err := Parse(text)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v; want %+v", text, got, err, want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for text, says := range map[string]string{
		"":                                        "RFC 7512",
		"token=t":                                 "RFC 7512",
		"PKCS11:token=t":                          "RFC 7512",
		"pkcs11:token=a;token=b":                  "twice",
		"pkcs11:token=":                           "empty",
		"pkcs11:token=%zz":                        "percent",
		"pkcs11:slot-id=x":                        "number",
		"pkcs11:slot-id=-1":                       "number",
		"pkcs11:type=private":                     "secret-key",
		"pkcs11:tokn=t":                           "tokn",
		"pkcs11:library-version=3":                "library-version",
		"pkcs11:?pin-value=1234":                  "pin-source",
		"pkcs11:?pin-source=|cat x":               "absolute",
		"pkcs11:?pin-source=pin":                  "absolute",
		"pkcs11:?pin-source=file:pin":             "absolute",
		"pkcs11:?pin-source=file://other/etc/pin": "another host",
		"pkcs11:?module-name=x":                   "module-name",
	} {
		if u, err := Parse(text); err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "1234") {
			t.Errorf("%s: %+v, %v", text, u, err)
		}
	}
}

// Whatever parses says the same when it is parsed again, and nothing panics.
func FuzzParse(f *testing.F) {
	f.Add("pkcs11:token=my%20token;object=seal?pin-source=file:/etc/pin")
	f.Fuzz(func(t *testing.T, text string) {
		a, errA := Parse(text)
		b, errB := Parse(text)
		if (errA == nil) != (errB == nil) || !reflect.DeepEqual(a, b) {
			t.Errorf("%q: %+v and %+v", text, a, b)
		}
	})
}
