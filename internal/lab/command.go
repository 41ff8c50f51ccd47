package lab

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// toolTime bounds the short programs that the lab runs itself. They take milliseconds,
// but one that changes rules waits for the whole machine: the kernel ends what other
// namespaces left (synchronize_rcu, net exit), and on two busy CPUs that has taken more
// than 30 s.
const toolTime = 2 * time.Minute

// Cmd is an exec.Cmd that starts in a namespace. Set its fields before it is
// started; Wait, StdoutPipe and the like are those of exec.Cmd.
//
// Do not set Pdeathsig: the kernel sends that signal when the thread that
// forked ends, and the Go runtime may end it at any time.
type Cmd struct {
	*exec.Cmd
	ns *Namespace
}

// Command prepares a program to run inside the namespace; it is killed when
// ctx ends. A missing program is reported when the command is started.
func (n *Namespace) Command(ctx context.Context, name string, args ...string) *Cmd {
	path, err := program(name)
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Args[0] = name
	if err != nil {
		cmd.Err = err
	}
	return &Cmd{Cmd: cmd, ns: n}
}

// Start starts the program, as [exec.Cmd.Start] does. The caller must Wait.
func (c *Cmd) Start() error { return c.ns.Do(c.Cmd.Start) }

// Run starts the program and waits for it, as [exec.Cmd.Run] does.
func (c *Cmd) Run() error { return c.ns.Do(c.Cmd.Run) }

// Output runs the program and returns what it wrote to its standard output, as
// [exec.Cmd.Output] does.
func (c *Cmd) Output() (out []byte, err error) {
	err = c.ns.Do(func() (err error) {
		out, err = c.Cmd.Output()
		return err
	})
	return out, err
}

// CombinedOutput runs the program and returns all that it wrote, as
// [exec.Cmd.CombinedOutput] does.
func (c *Cmd) CombinedOutput() (out []byte, err error) {
	err = c.ns.Do(func() (err error) {
		out, err = c.Cmd.CombinedOutput()
		return err
	})
	return out, err
}

// Output runs a short program inside the namespace and returns its standard output.
// The error has the standard error. The program may take two minutes; use Command
// for longer ones.
func (n *Namespace) Output(name string, args ...string) (string, error) {
	return n.feed("", name, args...)
}

// feed is Output with text on the program's standard input.
func (n *Namespace) feed(stdin, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), toolTime)
	defer cancel()
	var stdout, stderr strings.Builder
	cmd := n.Command(ctx, name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("no end within %v: %w", toolTime, err)
		}
		err = fmt.Errorf("run %s: %w", strings.Join(cmd.Args, " "), err)
		if text := strings.TrimSpace(stderr.String()); text != "" {
			err = fmt.Errorf("%w: %s", err, text)
		}
		return "", err
	}
	return stdout.String(), nil
}
