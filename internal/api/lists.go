package api

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/shares"
)

// What lists may hold of memory: at most maxListing are made at once, and those that
// are written take listsMemory bytes together, however slowly they are read. Both are
// shared out among the organizations of those who ask.
const (
	maxListing   = 32
	listsMemory  = 96 << 20
	listTime     = 30 * time.Second // for writing one out, which may be some MB
	listPatience = 2 * time.Second  // how long one waits for its turn
)

type lists struct{ making, memory *shares.Amount[org.ID] }

func newLists() lists {
	return lists{shares.NewAmount[org.ID](maxListing), shares.NewAmount[org.ID](listsMemory)}
}

// listing is before a handler that ends with writeList.
func (a *API) listing(c *gin.Context) {
	x := exchangeOf(c)
	waiting, cancel := context.WithTimeout(c.Request.Context(), listPatience)
	defer cancel()
	turn := a.lists.making.Await(waiting, x.caller.Org, 1)
	if turn == nil {
		a.reject(c, "overloaded", listsBusy)
		return
	}
	x.made = func() { turn(0) }
	defer x.made()
	c.Next()
}

// writeList answers with a list, which may be long.
func (a *API) writeList(c *gin.Context, list any) {
	text, err := json.Marshal(list)
	if err != nil {
		a.fail(c, err)
		return
	}
	x := exchangeOf(c)
	x.made()
	// It does not wait: the list is in memory meanwhile.
	keep := a.lists.memory.Take(x.caller.Org, shares.Counted(int64(len(text))))
	if keep == nil {
		a.reject(c, "overloaded", listsBusy)
		return
	}
	defer keep(0)
	if err := http.NewResponseController(underlying(c)).SetWriteDeadline(time.Now().Add(listTime)); err != nil && !errors.Is(err, http.ErrNotSupported) { // the console reads in this process
		a.Log.Warn("a list's writing has no deadline of its own", "request", x.id, "error", err)
	}
	c.Data(http.StatusOK, "application/json", text)
}
