package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// startTimeout is how long a daemon may take to become ready. On a busy machine it
// waits for the kernel, because each nftables change waits for all CPUs.
const startTimeout = 90 * time.Second

// Daemon is a conenatd that runs in the gateway, as a process of its own.
type Daemon struct {
	// Socket is the path of its control socket.
	Socket string

	cmd  *Cmd
	dir  string
	out  output
	exit chan error // receives the outcome of Wait once
}

// StartDaemon starts the program exe with "run" and args in the gateway, and waits
// until sd_notify reports that it is ready. The caller must Stop or Kill it.
func (l *Lab) StartDaemon(exe string, args ...string) (*Daemon, error) {
	d, err := l.launch(exe, args...)
	if err != nil {
		return nil, fmt.Errorf("start daemon: %w", err)
	}
	return d, nil
}

func (l *Lab) launch(exe string, args ...string) (*Daemon, error) {
	dir, err := os.MkdirTemp("", "conenatd-lab-")
	if err != nil {
		return nil, err
	}
	// The daemon may run as another user.
	if err := os.Chmod(dir, 0o777|os.ModeSticky); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	d := &Daemon{Socket: filepath.Join(dir, "control.sock"), dir: dir, exit: make(chan error, 1)}
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	defer notify.Close()
	if err := os.Chmod(notify.LocalAddr().String(), 0o666); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	args = append([]string{"run", "--control-socket", d.Socket, "--log-format=text"}, args...)
	d.cmd = l.Gateway.Command(context.Background(), exe, args...)
	d.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify.LocalAddr().String())
	d.cmd.Stdout, d.cmd.Stderr = &d.out, &d.out
	if err := d.cmd.Start(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	ended := make(chan struct{})
	go func() {
		d.exit <- d.cmd.Wait()
		close(ended)
		_ = notify.SetReadDeadline(time.Unix(0, 1)) // stop waiting for READY
	}()
	if err := notify.SetReadDeadline(time.Now().Add(startTimeout)); err != nil {
		return nil, errors.Join(err, d.Kill())
	}
	select {
	case <-ended: // before the deadline above was set
		_ = notify.SetReadDeadline(time.Unix(0, 1))
	default:
	}
	buf := make([]byte, 4096)
	for {
		n, err := notify.Read(buf)
		if err != nil {
			return nil, fmt.Errorf("it is not ready: %w: %s", err, d.trace())
		}
		if bytes.Contains(buf[:n], []byte("READY=1")) {
			return d, nil
		}
	}
}

// PID returns the process identifier.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Output returns what the daemon has written so far.
func (d *Daemon) Output() string { return d.out.String() }

// Signal sends a signal to the daemon.
func (d *Daemon) Signal(s os.Signal) error { return d.cmd.Process.Signal(s) }

// Pause stops all threads of the daemon where they are, until Resume.
func (d *Daemon) Pause() error {
	if err := d.Signal(syscall.SIGSTOP); err != nil {
		return fmt.Errorf("pause daemon: %w", err)
	}
	// A thread on another CPU stops only a moment later.
	for end := time.Now().Add(startTimeout); time.Now().Before(end); {
		stopped, err := d.stopped()
		if err != nil || stopped {
			return err
		}
	}
	return errors.New("pause daemon: it does not stop")
}

func (d *Daemon) stopped() (bool, error) {
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", d.PID()))
	if err != nil {
		return false, err
	}
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			return false, err
		}
		// The name before ')' may contain any character.
		if _, rest, _ := bytes.Cut(b[bytes.LastIndexByte(b, ')'):], []byte(" ")); rest[0] != 'T' {
			return false, nil
		}
	}
	return true, nil
}

// Resume ends a Pause.
func (d *Daemon) Resume() error { return d.Signal(syscall.SIGCONT) }

// Stop asks the daemon to end and waits for it. The error includes the daemon's
// output.
func (d *Daemon) Stop() error {
	if err := errors.Join(d.Resume(), d.Signal(syscall.SIGTERM)); err != nil {
		return errors.Join(fmt.Errorf("stop daemon: %w: %s", err, d.Output()), os.RemoveAll(d.dir))
	}
	if err := d.wait(); err != nil {
		return fmt.Errorf("stop daemon: %w: %s", err, d.Output())
	}
	return nil
}

// Kill ends the daemon as kill -9 does.
func (d *Daemon) Kill() error {
	if err := d.Signal(os.Kill); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill daemon: %w", err)
	}
	_ = d.wait() // the error says that it was killed
	return nil
}

// trace ends the daemon and returns its output, with the stacks of its goroutines if
// it was still running.
func (d *Daemon) trace() string {
	if err := d.Signal(syscall.SIGQUIT); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return errors.Join(err, d.Kill()).Error()
	}
	_ = d.wait() // SIGQUIT makes it fail
	return d.Output()
}

func (d *Daemon) wait() error {
	err := <-d.exit
	d.exit <- err
	return errors.Join(err, os.RemoveAll(d.dir))
}

// output collects what a process writes.
type output struct {
	mu sync.Mutex
	b  strings.Builder
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}
