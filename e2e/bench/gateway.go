package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// A gateway is an arm with its network namespaces.
type gateway struct {
	arm
	*lab.Lab
	exe string // conenatd

	daemon *lab.Daemon
	ear    *ear
	floods []*lab.Flood
	turns  int    // how many have begun
	limit  int    // of new flows in a turn
	fresh  int    // how many peers have been used
	probed int    // how many ports of latency probes have been used
	tables string // conenatd's, loaded without it
}

// sink counts and drops what comes to a host, so that no socket has to be emptied. Packets to
// and from the peers of the lab get through: only those of strangers are dropped.
const sink = `table ip sink { counter came { }; chain c { type filter hook prerouting priority raw; %s 100.64.0.0/10 counter name came drop; }; }`

func newGateway(a arm, exe string) (*gateway, error) {
	l, err := lab.New(lab.Options{Rules: a.rules})
	if err != nil {
		return nil, err
	}
	g := &gateway{arm: a, Lab: l, exe: exe}
	_, inside := l.Inside(0).Output("nft", fmt.Sprintf(sink, "ip saddr"))
	_, outside := l.Outside.Output("nft", fmt.Sprintf(sink, "ip daddr"))
	if err := errors.Join(inside, outside); err != nil {
		return nil, errors.Join(err, g.Close())
	}
	return g, nil
}

// Close ends all that is in the gateway, and removes what conenatd left in /run.
func (g *gateway) Close() error {
	var errs []error
	for _, f := range g.floods {
		errs = append(errs, f.Close())
	}
	errs = append(errs, g.deaf())
	if d := g.daemon; d != nil {
		g.daemon = nil
		if err := d.Stop(); err != nil {
			errs = append(errs, err, d.Kill())
		}
	}
	if g.args != nil {
		var files string
		err := g.Gateway.Do(func() (err error) {
			files, err = control.File(".*")
			return err
		})
		left, bad := filepath.Glob(files)
		errs = append(errs, err, bad)
		for _, path := range left {
			errs = append(errs, os.Remove(path))
		}
	}
	return errors.Join(append(errs, g.Lab.Close())...)
}

// flood prepares packets that are closed with the gateway.
func (g *gateway) flood(shape lab.Shape, n int, out bool) (*lab.Flood, error) {
	f, err := g.NewFloodOf(shape, n, out)
	if err == nil {
		g.floods = append(g.floods, f)
	}
	return f, err
}

// start starts what listens in the gateway: conenatd, another listener, or nobody.
func (g *gateway) start() error {
	if g.args == nil && !g.minimal {
		return g.hear()
	}
	if g.daemon == nil {
		d, err := g.launch()
		if err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
		g.daemon = d
		programs, _ := cpus()
		if err := pin(d.PID(), programs); err != nil {
			return err
		}
	}
	if g.dead {
		return g.kill()
	}
	if err := g.untilLean(); err != nil {
		return err
	}
	return g.settle()
}

// launch starts conenatd, or the minimal loop.
func (g *gateway) launch() (*lab.Daemon, error) {
	if !g.minimal {
		return g.StartDaemon(g.exe, g.args...)
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if err := os.Setenv(minimalEnv, "1"); err != nil {
		return nil, err
	}
	defer func() { _ = os.Unsetenv(minimalEnv) }()
	return g.StartDaemon(self)
}

func (g *gateway) kill() error {
	d := g.daemon
	g.daemon = nil
	return d.Kill()
}

// stop ends it, and takes what conenatd made out of the kernel.
func (g *gateway) stop() error {
	if d := g.daemon; d != nil {
		g.daemon = nil
		return d.Stop()
	}
	if g.args != nil {
		_, err := g.Gateway.Output(g.exe, "cleanup")
		return err
	}
	return g.deaf()
}

// status asks conenatd.
func (g *gateway) status() (control.Status, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return control.Dial(g.daemon.Socket).Status(ctx)
}

// until waits until the status of conenatd is as it should be.
func (g *gateway) until(what string, bound time.Duration, ok func(control.Status) bool) error {
	for end := time.Now().Add(bound); ; {
		began := time.Now()
		st, err := g.status()
		if err != nil {
			return err
		}
		if ok(st) {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s: waited in vain until %s: %d permissions stand, %d flows, events are %s",
				g.name, what, st.Permissions.Standing, st.Flows, st.Events.Mode)
		}
		time.Sleep(max(10*time.Millisecond, 2*time.Since(began)))
	}
}

func (g *gateway) untilLean() error {
	if !g.lean() {
		return nil
	}
	return g.until("events are lean", time.Minute, func(st control.Status) bool { return st.Events.Mode == "lean" })
}

// clock returns the CPU clock of the program in the gateway, if there is one that works.
func (g *gateway) clock() (clock, bool) {
	switch {
	case g.daemon != nil:
		return processClock(g.daemon.PID()), true
	case g.ear != nil && g.listen != silent:
		return g.ear.clock, true
	}
	return 0, false
}

// used waits until the program in the gateway has done all its work, and returns its CPU time.
func (g *gateway) used() (time.Duration, error) {
	c, ok := g.clock()
	if !ok {
		return 0, nil
	}
	if err := c.settle(); err != nil {
		return 0, err
	}
	return c.now()
}

// settle waits until the program in the gateway has done all its work.
func (g *gateway) settle() error {
	if c, ok := g.clock(); ok {
		return c.settle()
	}
	return nil
}

// pause stops conenatd until resume, so that it does nothing in the turns of others.
func (g *gateway) pause() error {
	if g.daemon == nil {
		return nil
	}
	return errors.Join(g.settle(), g.daemon.Pause())
}

func (g *gateway) resume() error {
	if g.daemon == nil {
		return nil
	}
	return errors.Join(g.daemon.Resume(), g.untilLean(), g.settle())
}

// came returns how many packets have come to the host since the last call.
func came(h *lab.Host) (int, error) {
	out, err := h.Output("nft", "reset", "counter", "ip", "sink", "came")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(out, "packets ")
	digits, _, _ := strings.Cut(rest, " ")
	return strconv.Atoi(digits)
}

// An ear is a listener to conntrack events.
type ear struct {
	fd      int
	clock   clock
	ended   chan struct{}
	program *lab.Cmd
	cancel  context.CancelFunc
}

// eventRoom is the receive buffer of an ear in bytes: enough for the flows of a turn.
const eventRoom = 64 << 20

// hear starts the gateway's listener.
func (g *gateway) hear() error {
	switch g.listen {
	case nobody:
		return nil
	case conntrackE:
		ctx, cancel := context.WithCancel(context.Background())
		g.ear = &ear{fd: -1, cancel: cancel, program: g.Gateway.Command(ctx, "conntrack", "-E", "-b", strconv.Itoa(eventRoom))}
		g.ear.program.Stdout = io.Discard
		return g.ear.run(g)
	}
	e := &ear{fd: -1, ended: make(chan struct{})}
	err := g.Gateway.Do(func() (err error) {
		if e.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER); err != nil {
			return err
		}
		const groups = 1<<(unix.NFNLGRP_CONNTRACK_NEW-1) | 1<<(unix.NFNLGRP_CONNTRACK_DESTROY-1)
		stop := unix.Timeval{Usec: 50_000}
		return errors.Join(
			unix.SetsockoptInt(e.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, eventRoom),
			unix.SetsockoptTimeval(e.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &stop),
			unix.Bind(e.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}))
	})
	g.ear = e
	if err != nil || g.listen == silent {
		close(e.ended)
		return err
	}
	began := make(chan error)
	ctx, cancel := context.WithCancel(context.Background())
	e.cancel = cancel
	go e.read(ctx, began)
	return <-began
}

// read reads one event at a time, as conntrack(8) does.
func (e *ear) read(ctx context.Context, began chan<- error) {
	defer close(e.ended)
	programs, _ := cpus()
	err := pinSelf(programs) // the thread ends with the goroutine
	e.clock = threadClock(unix.Gettid())
	began <- err
	buf := make([]byte, 1<<16)
	for ctx.Err() == nil {
		_, _, _ = unix.Recvfrom(e.fd, buf, 0) // errors: nothing for a moment, or events were lost
	}
}

// run starts the program and waits until it listens.
func (e *ear) run(g *gateway) error {
	if err := e.program.Start(); err != nil {
		return err
	}
	pid := e.program.Process.Pid
	e.clock = processClock(pid)
	programs, _ := cpus()
	if err := pin(pid, programs); err != nil {
		return err
	}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		there, err := listenersIn(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err != nil {
			return err
		}
		if len(there) > 0 {
			return nil
		}
	}
	return fmt.Errorf("%s: it does not listen", g.name)
}

// deaf ends the gateway's listener.
func (g *gateway) deaf() error {
	e := g.ear
	if e == nil {
		return nil
	}
	g.ear = nil
	if e.cancel != nil {
		e.cancel()
	}
	if e.program != nil {
		_ = e.program.Wait() // the error says that it was killed
		return nil
	}
	<-e.ended
	return unix.Close(e.fd)
}

// stranger returns the address of one of 4 million peers (RFC 6598).
func stranger(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{100, 64 | byte(i>>16)&63, byte(i >> 8), byte(i)})
}
