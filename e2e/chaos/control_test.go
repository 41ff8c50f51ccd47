package chaos

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Local programs attack the control socket: a thousand hold connections open; others
// send garbage or endless requests, or ask for the list and do not read it. Meanwhile
// the daemon does its work, and afterwards it answers again.
//
// Fails when the loop itself writes the list.
func TestControlSocketUnderAttack(t *testing.T) {
	s := controlScene{stage.New(t, lab.Options{})}
	s.Start(stage.Flags(stage.Expect)...) // here the daemon makes every permission
	proxy, media := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
	const ports = 6 // for a list larger than a socket's buffer
	scan := s.Scan(firstPort, ports)
	s.Must(scan.Send(0, scan.Len()))
	s.Until("all are listed", func() bool { return len(s.List()) == scan.Len() })

	const request = "GET /v1/permissions HTTP/1.1\r\nHost: c\r\n"
	done := 0
	for _, attack := range []struct {
		name    string
		clients int
		do      func(c net.Conn, end <-chan struct{}) // returns when the server hung up, or at end
	}{
		{"silence", 1000, func(c net.Conn, _ <-chan struct{}) { _, _ = c.Read(make([]byte, 1)) }},
		{"list that nobody reads", 10, func(c net.Conn, end <-chan struct{}) {
			fmt.Fprint(c, request+"\r\n")
			if n, _ := c.Read(make([]byte, 1)); n == 1 {
				<-end
			}
		}},
		{"garbage", 10, func(c net.Conn, _ <-chan struct{}) {
			_, _ = c.Write(bytes.Repeat([]byte("\x00garbage\xff"), 1<<10))
			_, _ = io.Copy(io.Discard, c)
		}},
		{"endless header", 10, func(c net.Conn, _ <-chan struct{}) {
			fmt.Fprint(c, request)
			for err := error(nil); err == nil; {
				_, err = fmt.Fprintf(c, "X: %s\r\n", strings.Repeat("x", 1000))
			}
		}},
		{"huge body", 10, func(c net.Conn, _ <-chan struct{}) {
			fmt.Fprint(c, "GET /v1/status HTTP/1.1\r\nHost: c\r\nContent-Length: 1000000000000\r\n\r\n")
			for err := error(nil); err == nil; {
				_, err = c.Write(make([]byte, 1<<20))
			}
		}},
	} {
		stop := s.attackControl(attack.clients, attack.do)
		for range contactsMeanwhile {
			in := s.InsideSocket(0, uint16(20_000+done))
			ext := s.Contact(in, proxy)
			s.Until("a new permission works in spite of "+attack.name, func() bool { return s.GetsIn(in, media, ext) })
			s.Must(in.Close())
			done++
		}
		t.Logf("%s: %d times", attack.name, stop())
	}
	if n := len(s.List()); n < done {
		t.Errorf("%d permissions are listed", n)
	}
	s.Verified()
}

// contactsMeanwhile is the number of new contacts during each attack.
const contactsMeanwhile = 10

type controlScene struct{ *stage.Scene }

// attackControl makes clients connect, and connect again when the server hangs up. It
// returns once the first is connected. stop ends them, and returns the number of
// connections.
func (s controlScene) attackControl(clients int, do func(c net.Conn, end <-chan struct{})) (stop func() int64) {
	s.T.Helper()
	end, there := make(chan struct{}), make(chan struct{}, 1)
	var all sync.WaitGroup
	var n atomic.Int64
	for range clients {
		all.Go(func() {
			for {
				select {
				case <-end:
					return
				default:
				}
				c, err := net.Dial("unix", s.Daemon.Socket)
				if err != nil {
					time.Sleep(10 * time.Millisecond) // the backlog is full; do not burn the CPU
					continue
				}
				n.Add(1)
				select {
				case there <- struct{}{}:
				default:
				}
				ended := make(chan struct{})
				go func() {
					select {
					case <-end:
						c.Close()
					case <-ended:
					}
				}()
				do(c, end)
				close(ended)
				c.Close()
			}
		})
	}
	<-there
	return func() int64 {
		close(end)
		all.Wait()
		return n.Load()
	}
}

// Only root and the daemon's group can talk to the daemon.
//
// Fails with a socket of mode 0666.
func TestControlSocketIsForRoot(t *testing.T) {
	s := stage.New(t, lab.Options{})
	s.Start(stage.Flags(stage.Auto)...)
	out, err := exec.CommandContext(t.Context(), "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
		s.ForAll(), "flush", "--control-socket", s.Daemon.Socket).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), "permission denied: run as root") {
		t.Errorf("%v, %s", err, out)
	}
}
