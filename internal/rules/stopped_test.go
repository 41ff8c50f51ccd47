package rules_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

const readsEnv = "CONENATD_TEST_READS"

// A process that is stopped for a long time while it reads rules continues where it was.
//
// Fails when a conn has a deadline of 5 s: the library then reads for ever.
func TestStoppedWhileItReads(t *testing.T) {
	if os.Getenv(readsEnv) != "" {
		readForEver()
	}
	l := lab.ForTest(t, lab.Options{})
	many := strings.Repeat("ip saddr 10.47.11.109 masquerade\n", 1000)
	// A table with our marker chain, into which somebody put many rules.
	if err := l.NFT("table ip busy { chain made_by_conenatd { }; chain post { type nat hook postrouting priority srcnat;\n" + many + "}; }"); err != nil {
		t.Fatal(err)
	}
	netns, err := unix.FcntlInt(uintptr(l.Gateway.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	reader := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^TestStoppedWhileItReads$")
	reader.Env = append(os.Environ(), readsEnv+"=1")
	reader.ExtraFiles = []*os.File{os.NewFile(uintptr(netns), "netns")}
	defer reader.ExtraFiles[0].Close()
	out, err := reader.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := reader.Start(); err != nil {
		t.Fatal(err)
	}
	reads := make(chan string)
	go func() {
		defer close(reads)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			reads <- lines.Text()
		}
	}()
	defer func() {
		_ = reader.Process.Kill()
		for range reads {
		}
		_ = reader.Wait()
	}()
	signal := func(s unix.Signal) {
		t.Helper()
		if err := unix.Kill(reader.Process.Pid, s); err != nil {
			t.Fatal(err)
		}
	}
	next := func() {
		t.Helper()
		select {
		case line := <-reads: // none where it ended
			if line != "read" {
				t.Fatalf("the reader says %q", line)
			}
		case <-time.After(time.Minute):
			t.Fatal("the reader does not go on")
		}
	}
	for range 2 {
		for pending := false; !pending; {
			next()
			signal(unix.SIGSTOP)
			if _, err := unix.Wait4(reader.Process.Pid, nil, unix.WUNTRACED, nil); err != nil {
				t.Fatal(err)
			}
			if pending = answersWait(t, l); !pending {
				signal(unix.SIGCONT)
			}
		}
		<-time.After(6 * time.Second) // every deadline passes
		signal(unix.SIGCONT)
		for range 3 { // one may be on its way
			next()
		}
	}
}

// readForEver reads rules in the namespace of descriptor 3, and says so each time.
func readForEver() {
	table, err := rules.Open(rules.Config{NetNS: 3, Name: "busy"})
	if err != nil {
		fmt.Println(err)
	}
	for {
		if _, err := table.Counters(); err != nil {
			fmt.Println(err)
		}
		fmt.Println("read")
	}
}

// answersWait reports whether unread netfilter answers are queued.
func answersWait(t *testing.T, l *lab.Lab) bool {
	t.Helper()
	var sockets []byte
	err := l.Gateway.Do(func() (err error) {
		sockets, err = os.ReadFile("/proc/thread-self/net/netlink")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(sockets)) {
		const netfilter = "12"
		if f := strings.Fields(line); len(f) > 4 && f[1] == netfilter && f[4] != "0" {
			return true
		}
	}
	return false
}
