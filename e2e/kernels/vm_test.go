package kernels

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// bootTime is generous: a boot takes 10 s without hardware virtualisation on an
// idle machine.
const bootTime = 2 * time.Minute

// vm is a guest that runs a Debian kernel on the host's files. Its methods must not
// be called concurrently.
type vm struct {
	dir    string // for sockets and the console
	status *serial
	output *serial
	exited chan struct{} // closed when QEMU is gone
	broken bool          // it did not answer, and is unusable
}

// serial is one of the guest's serial ports.
type serial struct {
	net.Conn
	*bufio.Reader
}

func (s *serial) Read(b []byte) (int, error) { return s.Reader.Read(b) }

// boot starts a guest with the files of the folder job in /run/job. The guest ends
// with the test, and with this process.
//
// With one thread for each CPU, QEMU once crashed a kernel (6.12, in
// sched_clock_cpu) that was patching its own code during the boot. One thread for
// both CPUs is no slower here. A guest that ends before it is ready is started once
// more; one that ends later is not, because a test may have caused that.
func boot(t *testing.T, k tree, job string) (*vm, error) {
	for tries := 1; ; tries++ {
		v, err := bootOnce(t, k, job)
		if !errors.Is(err, errEnded) || tries == 3 {
			return v, err
		}
		t.Logf("boot again: %v", err)
	}
}

// errEnded says that QEMU has exited, because of a panic in the guest or an error.
var errEnded = errors.New("the guest ended")

func bootOnce(t *testing.T, k tree, job string) (*vm, error) {
	ctx, cancel := context.WithTimeout(t.Context(), bootTime)
	defer cancel()
	modules, err := k.modules()
	if err != nil {
		return nil, err
	}
	// Not t.TempDir: the path of a socket must be short.
	dir, err := os.MkdirTemp("", "conenatd-vm-")
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	v := &vm{dir: dir, exited: make(chan struct{})}
	if err := k.writeImage(ctx, v.path("initramfs")); err != nil {
		return nil, err
	}
	var ports [2]net.Listener
	for i, name := range []string{"status", "output"} {
		if ports[i], err = net.Listen("unix", v.path(name)); err != nil {
			return nil, err
		}
		defer ports[i].Close()
	}
	if err := v.start(t, k, modules, job); err != nil {
		return nil, err
	}
	for i, s := range []**serial{&v.status, &v.output} {
		if *s, err = v.accept(ctx, ports[i]); err != nil {
			return nil, v.explain(err)
		}
		t.Cleanup(func() { (*s).Close() })
	}
	if err := v.ready(ctx); err != nil {
		return nil, v.explain(err)
	}
	return v, nil
}

func (v *vm) path(name string) string { return filepath.Join(v.dir, name) }

func (v *vm) start(t *testing.T, k tree, modules, job string) error {
	args := []string{
		"-no-user-config", "-nodefaults", "-no-reboot", "-display", "none",
		"-machine", "q35", "-accel", "tcg,thread=single", "-cpu", "max,-la57", "-smp", "2", "-m", "2048",
		"-kernel", k.path("vmlinux"), "-initrd", v.path("initramfs"),
		// A panic ends QEMU, by -no-reboot. The other options save time.
		"-append", "console=ttyS0 panic=-1 mitigations=off nokaslr random.trust_cpu=on",
		"-serial", "file:" + escape(v.path("console")),
	}
	for _, name := range []string{"status", "output"} {
		args = append(args, "-chardev", "socket,id="+name+",path="+escape(v.path(name)), "-serial", "chardev:"+name)
	}
	for _, share := range [][2]string{{"host", "/"}, {"modules", modules}, {"job", job}} {
		args = append(args, "-virtfs", "local,mount_tag="+share[0]+",path="+escape(share[1])+
			",security_model=none,readonly=on,multidevs=remap")
	}
	if os.Getenv(countEnv) != "" {
		// A nanosecond for each instruction. A second CPU does not start then.
		args = append(args, "-icount", "shift=0", "-smp", "1")
	}
	return v.qemu(t, "qemu-system-x86_64", args...)
}

// qemu starts QEMU, and closes exited when it is gone. It ends with the test.
func (v *vm) qemu(t *testing.T, program string, args ...string) error {
	// Not the test's context: Cleanup ends QEMU in the right order.
	ctx, kill := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, program, args...)
	// A test that ends by a timeout runs no Cleanup, so the kernel must end QEMU.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stderr, err := os.Create(v.path("stderr"))
	if err != nil {
		kill()
		return err
	}
	cmd.Stderr = stderr
	started := make(chan error, 1)
	go func() {
		// The kernel sends Pdeathsig when the thread that forked ends, so keep this
		// thread.
		runtime.LockOSThread()
		defer close(v.exited)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // killed
		}
	}()
	t.Cleanup(func() {
		kill()
		<-v.exited
		stderr.Close()
	})
	return <-started
}

// escape makes a path fit into QEMU's comma-separated options.
func escape(path string) string { return strings.ReplaceAll(path, ",", ",,") }

// accept waits until QEMU connects to a serial port.
func (v *vm) accept(ctx context.Context, l net.Listener) (*serial, error) {
	stop := v.watch(ctx, func() { l.Close() })
	defer stop()
	c, err := l.Accept()
	if err != nil {
		return nil, err
	}
	return &serial{c, bufio.NewReader(c)}, nil
}

// watch calls abort when ctx ends or QEMU exits, until stop.
func (v *vm) watch(ctx context.Context, abort func()) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-done:
		case <-ctx.Done():
			abort()
		case <-v.exited:
			abort()
		}
	}()
	return func() {
		close(done)
		<-ended // afterwards the caller may end ctx
	}
}

func (v *vm) ready(ctx context.Context) error {
	line, err := v.line(ctx, v.status, '\n')
	if err == nil && line != "ready" {
		err = fmt.Errorf("the guest says %q", line)
	}
	return err
}

// line reads from a serial port up to the byte end, which ends the message.
func (v *vm) line(ctx context.Context, s *serial, end byte) (string, error) {
	stop := v.watch(ctx, func() { s.SetReadDeadline(time.Unix(0, 1)) })
	defer stop()
	b, err := s.ReadString(end)
	if err != nil {
		return b, err
	}
	return b[:len(b)-1], nil
}

// run runs a command line with the guest's shell. It returns all its output. It
// returns an error if the guest does not answer before ctx ends; the guest is then
// unusable.
func (v *vm) run(ctx context.Context, command string) (out string, code int, err error) {
	if strings.Contains(command, "\n") {
		return "", 0, errors.New("a command must be one line")
	}
	if _, err := fmt.Fprintln(v.status, command); err != nil {
		return "", 0, v.explain(err)
	}
	// The whole output arrives before the status.
	out, err = v.line(ctx, v.output, 0)
	if err != nil {
		return out, 0, v.explain(err)
	}
	status, err := v.line(ctx, v.status, '\n')
	if err == nil {
		code, err = strconv.Atoi(status)
	}
	if err != nil {
		return out, 0, v.explain(err)
	}
	return out, code, nil
}

// explain says why the guest did not answer, with the last output of the kernel and of QEMU.
func (v *vm) explain(err error) error {
	v.broken = true
	select {
	case <-v.exited:
		err = errEnded
	default:
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, syscall.EPIPE): // QEMU is about to exit
			err = errEnded
		case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, net.ErrClosed):
			err = errors.New("the guest does not answer in time")
		}
	}
	return v.withOutput(err)
}

// withOutput adds the last output of the kernel and of QEMU to err.
func (v *vm) withOutput(err error) error {
	for _, name := range []string{"stderr", "console"} {
		b, _ := os.ReadFile(v.path(name))
		if text := strings.TrimSpace(string(b[max(0, len(b)-8000):])); text != "" {
			err = fmt.Errorf("%w\n%s: %s", err, name, text)
		}
	}
	return err
}
