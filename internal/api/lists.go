package api

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/gin-gonic/gin"
	"golang.org/x/sync/semaphore"
)

// What lists may hold of memory: at most maxListing are made at once, and those that
// are written take listsMemory bytes together, however slowly they are read.
const (
	maxListing   = 32
	listsMemory  = 96 << 20
	smallList    = 4 << 10          // bytes; it waits for no memory
	listTime     = 30 * time.Second // for writing one out, which may be some MB
	listPatience = 2 * time.Second  // how long one waits for its turn, and for memory
)

type lists struct{ making, memory *semaphore.Weighted }

func newLists() lists {
	return lists{semaphore.NewWeighted(maxListing), semaphore.NewWeighted(listsMemory)}
}

// listing is before a handler that ends with writeList.
func (a *API) listing(c *gin.Context) {
	if !acquire(c, a.lists.making, 1) {
		a.refuse(c, listsBusy)
		return
	}
	made := sync.OnceFunc(func() { a.lists.making.Release(1) })
	defer made()
	exchangeOf(c).made = made
	c.Next()
}

// writeList answers with a list, which may be long.
func (a *API) writeList(c *gin.Context, list any) {
	text, err := json.Marshal(list)
	if err != nil {
		a.fail(c, err)
		return
	}
	if held := int64(len(text)); held > smallList {
		held = min(held, listsMemory)
		if !acquire(c, a.lists.memory, held) {
			a.refuse(c, listsBusy)
			return
		}
		defer a.lists.memory.Release(held)
	}
	exchangeOf(c).made()
	if err := http.NewResponseController(underlying(c)).SetWriteDeadline(time.Now().Add(listTime)); err != nil && !errors.Is(err, http.ErrNotSupported) { // the console reads in this process
		a.Log.Warn("a list's writing has no deadline of its own", "request", exchangeOf(c).id, "error", err)
	}
	c.Data(http.StatusOK, "application/json", text)
}

func acquire(c *gin.Context, s *semaphore.Weighted, n int64) bool {
	ctx, cancel := context.WithTimeout(c.Request.Context(), listPatience)
	defer cancel()
	return s.Acquire(ctx, n) == nil
}
