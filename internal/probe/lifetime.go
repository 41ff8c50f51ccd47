package probe

import (
	"context"
	"net"
	"time"

	"github.com/pion/stun/v3"
)

// MaxLifetime bounds the search for a lifetime.
const MaxLifetime = 10 * time.Minute

// A Lifetime says how long the way back from the server stayed open without packets.
type Lifetime struct {
	AtLeast  float64 `json:"at_least"`            // seconds
	LessThan float64 `json:"less_than,omitempty"` // seconds; 0 if it was still open at the end
}

// silences are the times without packets after which the way back is tried, besides the bound
// itself.
var silences = []time.Duration{
	15 * time.Second, 25 * time.Second, 35 * time.Second, 55 * time.Second, 65 * time.Second, 95 * time.Second, 125 * time.Second,
	185 * time.Second, 245 * time.Second, 305 * time.Second,
}

// lifetime tests how long a mapping, and what its filter lets in, last without packets (RFC 5780
// section 4.6). Each silence has a socket of its own, which asks the server once; after the
// silence another socket asks the server to answer to the first one's outside port. The search
// ends with the first silence that was too long.
func (a *Answers) lifetime(ctx context.Context, o Options) error {
	by, err := a.socket()
	if err != nil {
		return err
	}
	defer by.Close()
	times := []time.Duration{0} // at once: does the server do it at all?
	for _, s := range silences {
		if s < o.Lifetime {
			times = append(times, s)
		}
	}
	times = append(times, o.Lifetime)
	var sockets []*net.UDPConn
	var ports []uint16
	for range times {
		c, err := a.socket()
		if err != nil {
			return err
		}
		defer c.Close()
		first := &request{to: a.Server}
		if err := exchange(ctx, o.rto, c, c, first); err != nil {
			return err
		}
		sockets, ports = append(sockets, c), append(ports, first.mapped().Port())
	}
	began := time.Now()
	for i, silence := range times {
		select {
		case <-time.After(time.Until(began.Add(silence))):
		case <-ctx.Done():
			return ctx.Err()
		}
		r := &request{to: a.Server, answerTo: ports[i]}
		if ports[i] != 0 {
			if err := exchange(ctx, o.rto, by, sockets[i], r); err != nil {
				return err
			}
		}
		came := r.answer != nil && r.answer.Type == stun.BindingSuccess
		switch {
		case silence == 0 && !came:
			return nil // a.Lifetime stays unknown
		case silence == 0:
			a.Lifetime = &Lifetime{}
		case came:
			a.Lifetime.AtLeast = silence.Seconds()
		default:
			a.Lifetime.LessThan = silence.Seconds()
			return nil
		}
	}
	return nil
}

func (l *Lifetime) String() string {
	seconds := func(s float64) string { return time.Duration(s * float64(time.Second)).String() }
	switch {
	case l.LessThan == 0:
		return "at least " + seconds(l.AtLeast)
	case l.AtLeast == 0:
		return "less than " + seconds(l.LessThan)
	}
	return "at least " + seconds(l.AtLeast) + ", and for less than " + seconds(l.LessThan)
}
