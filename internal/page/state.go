package page

import (
	"bytes"
	"context"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/doctor"
)

// mostRows is how many permissions one answer shows.
const mostRows = 200

// A state is what the page shows, without the events.
type state struct {
	Now      time.Time         `json:"now"`
	Version  string            `json:"version"`
	Started  time.Time         `json:"started"`
	Verdict  string            `json:"verdict"` // as the first line of "conenatd status"
	Findings []control.Finding `json:"findings"`
	Path     []step            `json:"path"`
	found
}

// A found is what a search found among the permissions.
type found struct {
	All   int    `json:"all"`   // permissions that there are
	Found int    `json:"found"` // those that the search selects
	Rows  []row  `json:"rows"`  // the first of them, at most mostRows
	Error string `json:"error,omitempty"`
}

// A row is a permission, with the words that "conenatd list" has for it.
type row struct {
	control.Permission
	PeerText  string `json:"peer_text"`
	StateText string `json:"state_text"`
}

// A reader reads the daemon for all clients together: whoever has the turn reads once, for
// all requests that wait. So neither the number of clients nor their haste costs the daemon
// anything, and without clients nothing runs.
type reader struct {
	src   Source
	pause time.Duration
	turn  chan struct{} // full while a request reads
	ready time.Time     // when the next reading may begin; of the one who has the turn

	lock    sync.Mutex
	waiting []*question
}

// A question is a request that waits.
type question struct {
	search search
	answer chan state // has room for the answer
}

// newReader returns a reader that pauses so long between two readings, or as long as the last
// one took if that is longer.
func newReader(src Source, pause time.Duration) *reader {
	return &reader{src: src, pause: pause, turn: make(chan struct{}, 1)}
}

// serve answers with the state, and with the permissions that the parameter "search" selects.
func (rd *reader) serve(w http.ResponseWriter, r *http.Request) {
	q := &question{parseSearch(r.URL.Query().Get("search")), make(chan state, 1)}
	rd.lock.Lock()
	rd.waiting = append(rd.waiting, q)
	rd.lock.Unlock()
	select {
	case st := <-q.answer:
		writeJSON(w, st)
	case <-r.Context().Done():
		rd.drop(q)
	case rd.turn <- struct{}{}:
		rd.read(r.Context(), q)
		<-rd.turn
		select {
		case st := <-q.answer:
			writeJSON(w, st)
		default:
			rd.drop(q) // the client has gone
		}
	}
}

// drop forgets a question whose client has gone.
func (rd *reader) drop(q *question) {
	rd.lock.Lock()
	defer rd.lock.Unlock()
	rd.waiting = slices.DeleteFunc(rd.waiting, func(x *question) bool { return x == q })
}

// read waits for its time and answers all questions, unless q has its answer already or ctx
// ends before.
func (rd *reader) read(ctx context.Context, q *question) {
	if len(q.answer) > 0 {
		return
	}
	wait := time.NewTimer(time.Until(rd.ready))
	defer wait.Stop()
	select {
	case <-wait.C:
	case <-ctx.Done():
		return
	}
	rd.lock.Lock()
	all := rd.waiting
	rd.waiting = nil
	rd.lock.Unlock()

	began := time.Now()
	status := rd.src.Status()
	results := rd.find(all)
	findings := append([]control.Finding{}, status.Findings...) // not null
	for i, q := range all {
		q.answer <- state{
			Now: time.Now(), Version: status.Version, Started: status.Started, Verdict: doctor.Verdict(status),
			Findings: findings, Path: path(&status), found: results[i],
		}
	}
	ended := time.Now()
	rd.ready = ended.Add(max(rd.pause, ended.Sub(began)))
}

// find walks the permissions once for all questions.
func (rd *reader) find(all []*question) []found {
	tables := make([]table, len(all))
	n := 0
	var text []byte
	err := rd.src.Permissions(func(p control.Permission) bool {
		n++
		text = appendText(text[:0], &p)
		for i, q := range all {
			if q.search.selects(&p, text) {
				tables[i].add(&p)
			}
		}
		return true
	})
	results := make([]found, len(all))
	for i := range tables {
		results[i] = found{All: n, Found: tables[i].found, Rows: tables[i].rows()}
		if err != nil {
			results[i].Error = "the list is not complete: " + err.Error()
		}
	}
	return results
}

// A table keeps the first mostRows permissions, in the order of "conenatd list".
type table struct {
	found int
	first []control.Permission
}

func (t *table) add(p *control.Permission) {
	t.found++
	at, _ := slices.BinarySearchFunc(t.first, *p, control.ComparePermissions)
	if at == mostRows {
		return
	}
	if len(t.first) == mostRows {
		t.first = t.first[:mostRows-1]
	}
	t.first = slices.Insert(t.first, at, *p)
}

func (t *table) rows() []row {
	rows := make([]row, len(t.first))
	for i, p := range t.first {
		rows[i] = row{p, p.PeerText(), control.Inactive(p)}
	}
	return rows
}

// A search is what a person typed, split into words. A permission must match each word.
type search []word

// A word matches a permission if it is part of its text, or, as a prefix, contains one of its
// addresses.
type word struct {
	text   []byte
	filter []control.Filter
}

func parseSearch(text string) (s search) {
	for _, field := range strings.Fields(strings.ToLower(text)) {
		w := word{text: []byte(field)}
		if strings.Contains(field, "/") {
			var host, peer control.Filter
			if host.SetHost(field) == nil && peer.SetPeer(field) == nil {
				w.filter = []control.Filter{host, peer}
			}
		}
		s = append(s, w)
	}
	return s
}

// selects reports whether p, which has this text, matches all words.
func (s search) selects(p *control.Permission, text []byte) bool {
	return !slices.ContainsFunc(s, func(w word) bool {
		return !bytes.Contains(text, w.text) && !slices.ContainsFunc(w.filter, func(f control.Filter) bool { return f.Selects(p) })
	})
}

// appendText appends what a person may search for in p, in lower case.
func appendText(b []byte, p *control.Permission) []byte {
	b = p.Int.AppendTo(b)
	b = append(b, ' ')
	b = p.Ext.AppendTo(b)
	for _, s := range []string{p.PeerText(), control.Inactive(*p), p.Backend} {
		b = append(b, ' ')
		b = append(b, strings.ToLower(s)...)
	}
	return b
}
