package guest

import (
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/lab"
)

// Lifetimes count the time that the machine is awake, whatever the wall clock says.

// lifetime is long enough for an emulated machine to run the checks meanwhile.
const lifetime = 12 * time.Second

// A watched permission is the only one in its scene, and nothing refreshes it any more.
type watched struct {
	*stage.Scene
	phone *lab.Socket
	ext   netip.AddrPort
	began time.Time    // before the last refresh
	fresh func() error // sends a packet from a fresh port of the peer
}

func watch(t *testing.T, mode []string) *watched {
	t.Helper()
	w := &watched{Scene: stage.New(t, lab.Options{})}
	w.Start(stage.Flags(mode, "--reconcile=1h", "--lifetime="+lifetime.String())...)
	w.phone = w.InsideSocket(0, 5060)
	proxy := w.PeerSocket(lab.PeerA, 5060)
	w.began = time.Now()
	w.ext = w.Contact(w.phone, proxy)
	w.Stands(w.phone, proxy, w.ext)
	_, err := w.Gateway.Output("conntrack", "-D", "-p", "udp", "--sport", "5060") // anchors are not affected
	w.Must(err)
	w.Until("its flow is gone", func() bool { return w.List()[0].Flows == 0 })
	w.fresh = w.FreshPorts(w.phone, lab.PeerA, w.ext)
	return w
}

// A look is what is seen of a permission at one moment.
type look struct {
	at        time.Time
	age, left time.Duration // as shown
	kernel    time.Duration // how long it would last without the daemon
}

// look also checks that the permission works, and that kernel and daemon agree.
func (w *watched) look() (l look) {
	w.T.Helper()
	w.Must(w.fresh())
	l.at = time.Now()
	l.kernel = w.inKernel()
	ps := w.List()
	if len(ps) != 1 || ps[0].State != "standing" {
		w.T.Fatalf("want one permission that stands: %+v", ps)
	}
	l.age, l.left = l.at.Sub(ps[0].Since), ps[0].Expires.Sub(l.at)
	v, err := control.Dial(w.Daemon.Socket).Verify(w.T.Context())
	w.Must(err)
	if len(v.Wrong) > 0 {
		w.T.Errorf("the daemon and the kernel do not agree: %q", v.Wrong)
	}
	return l
}

// inKernel returns how long the kernel will keep the permission. For an expectation it
// needs no program.
func (w *watched) inKernel() time.Duration {
	w.T.Helper()
	found, err := expect.Left(w.Gateway.FD())
	w.Must(err)
	if len(found) == 1 {
		return found[0].Left
	}
	elements := strings.Join(w.Elements(), "\n")
	_, rest, _ := strings.Cut(elements, "expires ")
	text, _, _ := strings.Cut(rest, " ")
	left, err := time.ParseDuration(text)
	if err != nil {
		w.T.Fatalf("neither an expectation nor an element: %v in %q", err, elements)
	}
	return left
}

// since checks that only the awake time since before has passed.
func (now look) since(t *testing.T, before look) {
	t.Helper()
	const grain = 2 * time.Second // expectations count whole seconds, and each look takes time
	passed := now.at.Sub(before.at)
	for what, d := range map[string]time.Duration{
		"age": now.age - before.age - passed, "time left": before.left - now.left - passed,
	} {
		if d.Abs() > grain {
			t.Errorf("after %v the %s is off by %v", passed, what, d)
		}
	}
	// The daemon may have refreshed it meanwhile.
	if now.kernel < before.kernel-passed-grain || now.kernel > lifetime {
		t.Errorf("after %v the kernel keeps it for %v, before for %v", passed, now.kernel, before.kernel)
	}
}

// ends waits until the permission ends, and checks that this is neither early nor late.
func (w *watched) ends() {
	w.T.Helper()
	const slack = 20 * time.Second
	for len(w.List()) > 0 {
		if time.Since(w.began) > lifetime+slack {
			w.T.Fatalf("it stands after %v: %+v", time.Since(w.began), w.List())
		}
	}
	lived := time.Since(w.began)
	w.T.Logf("it ended after %v", lived)
	if lived < lifetime {
		w.T.Error("too early")
	}
	fence := w.PeerSocket(lab.PeerB, 5060)
	w.Contact(w.phone, fence)
	w.Must(lab.Lost(w.phone,
		lab.Packet{From: w.PeerSocket(lab.PeerA, 9999), To: w.ext, Payload: stage.Payload("must not arrive")},
		lab.Packet{From: fence, To: w.ext, Payload: stage.Payload("fence")}))
}

// The wall clock is set one day forward, then two days back.
//
// Fails when the daemon's clock is the wall clock, and when displayed times are counted
// from the wall clock at its start.
func TestWallClockJumps(t *testing.T) {
	if os.Getenv("CONENATD_GUEST") == "" {
		t.Skip(`it would set this machine's clock: run "make kernels"`)
	}
	// One after the other would take twice as long.
	all := []*watched{watch(t, stage.Expect), watch(t, stage.NFT)}
	look := func() (looks []look) {
		t.Helper()
		for _, w := range all {
			looks = append(looks, w.look())
		}
		return looks
	}
	const day = 24 * time.Hour
	before := look()
	for _, by := range []time.Duration{day, -2 * day} {
		setClock(t, by)
		t.Cleanup(func() { setClock(t, -by) })
		for i, now := range look() {
			now.since(t, before[i])
		}
	}
	for _, w := range all {
		w.ends()
	}
}

func setClock(t *testing.T, by time.Duration) {
	t.Helper()
	wall := clock(t, unix.CLOCK_REALTIME) + by
	ts := unix.NsecToTimespec(wall.Nanoseconds())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		t.Fatal(err)
	}
}

func clock(t *testing.T, id int32) time.Duration {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(id, &ts); err != nil {
		t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

// The machine sleeps for longer than a lifetime.
//
// Fails when the daemon's clock runs during the sleep, as CLOCK_BOOTTIME and the wall
// clock do, and when displayed times are counted from the wall clock at its start.
func TestSuspend(t *testing.T) {
	if os.Getenv("CONENATD_SUSPEND") == "" {
		t.Skip("it suspends this machine, and a guest without its files afterwards: package kernels runs it last")
	}
	w := watch(t, stage.Expect) // after the suspend no program can start; an expectation is listed without one
	before := w.look()
	for slept := time.Duration(0); slept <= lifetime; {
		slept += suspend(t)
		t.Logf("suspended for %v", slept)
	}
	w.look().since(t, before)
	w.ends()
}

// suspend suspends the machine for some seconds, and returns how long that was. Devices,
// the other CPU and timekeeping are suspended, as far as a kernel can. Then the kernel
// waits instead of entering the firmware's sleep, from which nothing would wake this
// guest (the kernel's Documentation/power/basic-pm-debugging.rst, "core").
func suspend(t *testing.T) time.Duration {
	t.Helper()
	asleep := func() time.Duration { return clock(t, unix.CLOCK_BOOTTIME) - clock(t, unix.CLOCK_MONOTONIC) }
	before := asleep()
	for _, set := range [][2]string{
		// The delay counts loops, so it takes longer if others use the CPU too.
		{"/sys/module/suspend/parameters/pm_test_delay", "3"},
		{"/sys/power/pm_test", "core"},
		{"/sys/power/mem_sleep", "deep"},
		{"/sys/power/state", "mem"}, // returns after the resume
	} {
		if err := os.WriteFile(set[0], []byte(set[1]), 0); err != nil {
			t.Fatal(err)
		}
	}
	return asleep() - before
}
