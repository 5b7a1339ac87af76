package api_test

import (
	"os"
	"slices"
	"testing"

	"github.com/orgkeys/orgkeys/internal/api"
	"github.com/orgkeys/orgkeys/internal/api/openapitest"
)

func TestMain(m *testing.M) {
	api.CheckExchange = openapitest.Check
	os.Exit(m.Run())
}

func TestDocumentAndRoutesAreTheSame(t *testing.T) {
	documented, err := openapitest.Operations()
	if err != nil {
		t.Fatal(err)
	}
	if served := api.PublicRoutes(t); len(served) == 0 || !slices.Equal(served, documented) {
		t.Errorf("served:     %q\ndocumented: %q", served, documented)
	}
}
