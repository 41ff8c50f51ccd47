package metrics

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"

	"github.com/conenatd/conenatd/internal/control"
)

// Fails when two scrapes ask the daemon at once, when one that waits is never answered, and when
// one whose client has gone goes on waiting.
func TestScrapesTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked, answers := 0, make(chan control.Status)
		h := Handler(func() control.Status { asked++; return <-answers })
		scrape := func(ctx context.Context) *httptest.ResponseRecorder {
			w := httptest.NewRecorder()
			go h.ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodGet, "/metrics", http.NoBody))
			synctest.Wait()
			return w
		}
		first := scrape(t.Context())
		gone, leave := context.WithCancel(t.Context())
		lost := scrape(gone)
		second := scrape(t.Context())
		leave()
		synctest.Wait()
		for i, w := range []*httptest.ResponseRecorder{first, second} {
			if asked != i+1 {
				t.Errorf("the daemon was asked %d times, want %d", asked, i+1)
			}
			answers <- control.Status{}
			synctest.Wait()
			if w.Body.Len() == 0 {
				t.Errorf("scrape %d is not answered", i)
			}
		}
		if lost.Body.Len() > 0 {
			t.Error("a scrape whose client has gone is answered")
		}
	})
}
