package audit

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

// flushAt is how many bytes may wait before they are written.
const flushAt = 64 << 10

// A record is one line of the file.
type record struct {
	Time     string `json:"time"` // UTC, RFC 3339, milliseconds
	Event    string `json:"event"`
	Protocol string `json:"protocol,omitempty"`
	Inside   string `json:"inside,omitempty"`
	Outside  string `json:"outside,omitempty"`
	Zone     uint16 `json:"zone,omitempty"`
	Peer     string `json:"peer,omitempty"`
	Lost     uint64 `json:"lost,omitempty"`
}

// A Mapping is an inside endpoint with its outside endpoint.
type Mapping struct {
	Int, Ext cone.Endpoint
	Zone     uint16
}

// A Log writes records. It knows a mapping by its permissions: the mapping begins with the
// first of them, and ends with the last.
type Log struct {
	lock  chan struct{} // has an element while somebody uses file or peers
	file  io.WriteCloser
	peers bool

	waiting []byte // to be written
	records uint64 // in waiting
	cut     bool   // the last write ended within a line
	missing uint64 // records that could not be written, and are not told in the file

	lost   uint64 // records that could not be written since the last Flush
	failed error  // why not

	standing map[cone.Key]Mapping
	count    map[Mapping]int
}

// New returns a Log that writes to file, with the peers if they are wanted.
func New(file io.WriteCloser, peers bool) *Log {
	return &Log{lock: make(chan struct{}, 1), file: file, peers: peers, standing: make(map[cone.Key]Mapping), count: make(map[Mapping]int)}
}

// ErrSlow says that a file system, such as NFS without its server, does not answer.
var ErrSlow = errors.New("its file system does not answer: mount it again, or name another file")

// Replace makes the Log write to another file from now on, and closes the old one. If the old one
// still hangs when end fires, it returns ErrSlow and changes nothing. Any goroutine may call it.
func (l *Log) Replace(end <-chan time.Time, file io.WriteCloser, peers bool) error {
	select {
	case l.lock <- struct{}{}:
	case <-end:
		return ErrSlow
	}
	old := l.file
	l.file, l.peers = file, peers
	<-l.lock
	_, err := within(end, func() (struct{}, error) { return struct{}{}, old.Close() }, nil)
	if errors.Is(err, ErrSlow) { // it is closed later, and nothing is missing as far as is known
		return nil
	}
	return err
}

// within returns what f does, or ErrSlow if end fires first. Then late, if any, gets what f returns.
func within[T any](end <-chan time.Time, f func() (T, error), late func(T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := f()
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-end:
		if late != nil {
			go func() {
				r := <-done
				late(r.value, r.err)
			}()
		}
		var none T
		return none, ErrSlow
	}
}

// Observe takes in an event.
func (l *Log) Observe(at time.Time, e *cone.Event) {
	switch e.Kind {
	case cone.EventGranted:
		l.grant(at, e.Permission)
	case cone.EventRevoked:
		l.revoke(at, e.Key)
	case cone.EventChild:
		l.child(at, "child_begin", e)
	case cone.EventChildGone:
		l.child(at, "child_end", e)
	}
}

func (l *Log) grant(at time.Time, p cone.Permission) {
	m := Mapping{p.Int, p.Ext, p.Zone}
	if old, ok := l.standing[p.Key]; ok {
		if old == m {
			return
		}
		l.revoke(at, p.Key)
	}
	l.standing[p.Key] = m
	if l.count[m]++; l.count[m] == 1 {
		l.add(at, m.record(at, "mapping_begin"))
	}
}

func (l *Log) revoke(at time.Time, k cone.Key) {
	m, ok := l.standing[k]
	if !ok {
		return
	}
	delete(l.standing, k)
	if l.count[m]--; l.count[m] == 0 {
		delete(l.count, m)
		l.add(at, m.record(at, "mapping_end"))
	}
}

func (l *Log) child(at time.Time, event string, e *cone.Event) {
	r := Mapping{e.Int, e.Ext, e.Zone}.record(at, event)
	l.lock <- struct{}{}
	if l.peers {
		r.Peer = e.From.Netip().String()
	}
	<-l.lock
	l.add(at, r)
}

func (m Mapping) record(at time.Time, event string) record {
	return record{
		Time: stamp(at), Event: event, Protocol: "udp",
		Inside: endpoint(m.Int), Outside: endpoint(m.Ext), Zone: m.Zone,
	}
}

func endpoint(e cone.Endpoint) string {
	if a := e.Netip(); a != (netip.AddrPort{}) {
		return a.String()
	}
	return ""
}

func stamp(at time.Time) string { return at.UTC().Format("2006-01-02T15:04:05.000Z") }

// Lost records that n events did not come. Follow it with Sync.
func (l *Log) Lost(at time.Time, n uint64) {
	l.add(at, record{Time: stamp(at), Event: "lost", Lost: n})
}

// Sync makes good what lost events would have told: standing are all permissions now.
func (l *Log) Sync(at time.Time, standing []cone.Permission) {
	now := make(map[cone.Key]bool, len(standing))
	for _, p := range standing {
		now[p.Key] = true
	}
	for k := range l.standing {
		if !now[k] {
			l.revoke(at, k)
		}
	}
	for _, p := range standing {
		l.grant(at, p)
	}
}

// End records that all mappings end.
func (l *Log) End(at time.Time) {
	for _, k := range slices.Collect(maps.Keys(l.standing)) {
		l.revoke(at, k)
	}
}

func (l *Log) add(at time.Time, r record) {
	line, err := json.Marshal(r)
	if err != nil {
		panic(err) // only strings and numbers
	}
	l.waiting = append(append(l.waiting, line...), '\n')
	l.records++
	if len(l.waiting) >= flushAt {
		l.write(at)
	}
}

// Flush writes what waits. n is how many records are lost since the last Flush because they
// could not be written, and err says why. The next write that succeeds tells it in the file.
func (l *Log) Flush(at time.Time) (n uint64, err error) {
	if l.records > 0 {
		l.write(at)
	}
	n, err = l.lost, l.failed
	l.lost, l.failed = 0, nil
	return n, err
}

func (l *Log) write(at time.Time) {
	text := l.waiting
	if l.missing > 0 {
		line, _ := json.Marshal(record{Time: stamp(at), Event: "lost", Lost: l.missing})
		text = slices.Concat(line, []byte("\n"), text)
	}
	if l.cut {
		text = append([]byte("\n"), text...)
	}
	l.lock <- struct{}{}
	wrote, err := l.file.Write(text)
	<-l.lock
	if err != nil {
		if wrote > 0 {
			l.cut = text[wrote-1] != '\n'
		}
		l.missing += l.records
		l.lost, l.failed = l.lost+l.records, fmt.Errorf("write the audit log: %w", err)
	} else {
		l.missing, l.cut = 0, false
	}
	l.waiting, l.records = l.waiting[:0], 0
}

// Close writes what waits, and closes the file.
func (l *Log) Close(at time.Time) (n uint64, err error) {
	n, err = l.Flush(at)
	l.lock <- struct{}{}
	defer func() { <-l.lock }()
	if e := l.file.Close(); err == nil && e != nil {
		err = fmt.Errorf("close the audit log: %w", e)
	}
	return n, err
}
