package ctwatch

import (
	"cmp"
	"errors"
	"os"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/ti-mo/conntrack"
)

// Counts are what conntrack has done in a network namespace, on all CPUs together (struct
// ip_conntrack_stat, conntrack(8)).
type Counts struct {
	InsertFailed  uint64 // packets dropped because their new entry could not be put into the table
	Drop          uint64 // packets dropped: those of InsertFailed, and those that got no new entry
	EarlyDrop     uint64 // entries taken out to make room in a full table
	Invalid       uint64 // packets that cannot be tracked
	Error         uint64 // ICMP messages that cannot be tracked
	SearchRestart uint64 // look-ups that began anew because the table changed

	ExpectationsMade  uint64
	ExpectationsEnded uint64
	Expected          uint64 // entries that an expectation admitted
}

// Statistics tells how full conntrack is, and counts what it does from the first call of
// Counts on. The kernel's counters start with the network namespace, one set for each CPU,
// and have 32 bits: call Counts before a counter can grow by 2^32.
//
// Only one goroutine at a time may use it, Close included. It has connections of its own,
// so it may be asked within a Dump of a Queries.
type Statistics struct {
	cfg    Config
	table  *Queries
	conn   *conntrack.Conn // nil until it is opened
	total  Counts
	last   map[uint16]cpuCounts // the kernel's counters at the last call, by CPU; nil before the first
	closed bool
}

// cpuCounts are the counters of one CPU.
type cpuCounts struct {
	flows    conntrack.Stats
	expected conntrack.StatsExpect
}

// DialStatistics opens the sockets. It needs CAP_NET_ADMIN in the user namespace that owns
// the network namespace; without it the first query fails.
func DialStatistics(cfg Config) (*Statistics, error) {
	cfg.Timeout = cmp.Or(cfg.Timeout, DefaultTimeout)
	table, err := DialQueries(cfg)
	if err != nil {
		return nil, err
	}
	s := &Statistics{cfg: cfg, table: table}
	if err := s.open(); err != nil {
		return nil, errors.Join(err, table.Close())
	}
	return s, nil
}

func (s *Statistics) open() (err error) {
	switch {
	case s.closed:
		return errClosed
	case s.conn != nil:
		return nil
	}
	if s.conn, err = conntrack.Dial(&netlink.Config{NetNS: s.cfg.NetNS}); err != nil {
		return wrap("open socket for conntrack statistics", err)
	}
	return nil
}

// Table tells how full the table is.
func (s *Statistics) Table() (Table, error) { return s.table.Table() }

// Counts returns the counts since its first call, which returns zeros. It costs two
// queries. With an error it returns the counts of the call before.
func (s *Statistics) Counts() (Counts, error) {
	if err := s.open(); err != nil {
		return s.total, err
	}
	now, err := s.ask()
	if err != nil {
		_ = s.reset()
		return s.total, wrap("read conntrack statistics", err)
	}
	s.add(now)
	return s.total, nil
}

// ask asks the kernel (ctnetlink_ct_stat_cpu_dump, ctnetlink_exp_stat_cpu_dump).
func (s *Statistics) ask() (map[uint16]cpuCounts, error) {
	// The library sets no deadline on its connection, but the connection may be closed
	// meanwhile.
	conn := s.conn
	late := time.AfterFunc(s.cfg.Timeout, func() { _ = conn.Close() })
	flows, err := conn.Stats()
	var expected []conntrack.StatsExpect
	if err == nil {
		expected, err = conn.StatsExpect()
	}
	switch inTime := late.Stop(); {
	case !inTime:
		return nil, os.ErrDeadlineExceeded
	case err != nil:
		return nil, err
	}
	now := make(map[uint16]cpuCounts, len(flows))
	for _, f := range flows {
		now[f.CPUID] = cpuCounts{flows: f}
	}
	for _, e := range expected {
		now[e.CPUID] = cpuCounts{now[e.CPUID].flows, e}
	}
	return now, nil
}

// add adds to the totals what the counters grew by since the last call.
func (s *Statistics) add(now map[uint16]cpuCounts) {
	was := s.last
	s.last = now
	if was == nil {
		return
	}
	t := &s.total
	for cpu, is := range now {
		was := was[cpu]
		grow(&t.InsertFailed, was.flows.InsertFailed, is.flows.InsertFailed)
		grow(&t.Drop, was.flows.Drop, is.flows.Drop)
		grow(&t.EarlyDrop, was.flows.EarlyDrop, is.flows.EarlyDrop)
		grow(&t.Invalid, was.flows.Invalid, is.flows.Invalid)
		grow(&t.Error, was.flows.Error, is.flows.Error)
		grow(&t.SearchRestart, was.flows.SearchRestart, is.flows.SearchRestart)
		grow(&t.ExpectationsMade, was.expected.Create, is.expected.Create)
		grow(&t.ExpectationsEnded, was.expected.Delete, is.expected.Delete)
		grow(&t.Expected, was.expected.New, is.expected.New)
	}
}

// grow adds to total the growth of a counter, which may have wrapped meanwhile.
func grow(total *uint64, was, is uint32) { *total += uint64(is - was) }

// reset closes the socket, and so discards late answers to an old query.
func (s *Statistics) reset() error {
	if s.conn == nil {
		return nil
	}
	conn := s.conn
	s.conn = nil
	return conn.Close()
}

// Close closes the sockets. A second Close does nothing.
func (s *Statistics) Close() error {
	s.closed = true
	return errors.Join(s.reset(), s.table.Close())
}
