package expect

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/cone"
)

func unhex(s string) []byte {
	b, err := hex.DecodeString(compact(s))
	if err != nil {
		panic(err)
	}
	return b
}

// Bodies of messages from Linux 6.18 on x86-64: what it shows of seed, routed
// and, with mark 0x2a, zoned.
var (
	goldenExpectation = unhex(`
		02000000
		34000280 14000180 08000100cb007105 08000200c6336401 1c000280 0500010011000000 0600020000000000 0600030013c40000
		34000380 14000180 08000100ffffffff 08000200ffffffff 1c000280 0500010011000000 0600020000000000 06000300ffff0000
		34000180 14000180 080001000a2f0b6d 08000200cb007105 1c000280 0500010011000000 0600020000000000 0600030013c40000
		40000a80 0800010000000001
		  34000280 14000180 080001000a2f0b6d 0800020000000000 1c000280 0500010011000000 0600020013c60000 0600030000000000
		080004000000003c 08000500de204259 0800080000000001 0800090000000000 0800060052415300
		16000b006e61742d666f6c6c6f772d6d6173746572000000`)
	goldenRouted = unhex(`
		0a000000
		4c000280 2c000180 1400030020010db8000500000000000000000005 1400040020010db8004700000000000000000109
		         1c000280 0500010011000000 0600020000000000 0600030013c40000
		4c000380 2c000180 14000300ffffffffffffffffffffffffffffffff 14000400ffffffffffffffffffffffffffffffff
		         1c000280 0500010011000000 0600020000000000 06000300ffff0000
		4c000180 2c000180 1400030020010db8004700000000000000000109 1400040020010db8000500000000000000000005
		         1c000280 0500010011000000 0600020000000000 0600030013c40000
		080004000000003c 0800050025e58084 0800080000000001 0800090000000000 0800060052415300`)
	goldenAnchor = unhex(`
		02000000
		34000180 14000180 080001000a2f0b6d 08000200cb007105 1c000280 0500010011000000 0600020000000000 0600030013c40000
		34000280 14000180 08000100cb007105 080002000a2f0b6d 1c000280 0500010011000000 0600020013c40000 0600030000000000
		0600120000070000 080003000000200c 080008000000002a 08000c0060b6c062 08000b0000000001 080007000000770c
		0c000580 0800010052415300
		1c001880 0800010000000000 0800020000000000 0800030000000000`)
)

func littleEndian(t testing.TB) {
	t.Helper()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the golden bytes are those of a little-endian machine")
	}
}

// Linux 5.10 allows an expectation on an anchor whose helper was unregistered.
func TestExpectationWithoutHelperDoesNotStand(t *testing.T) {
	littleEndian(t)
	help := unhex("0800060052415300")
	x, ok := parseExpectation(bytes.Replace(goldenExpectation, help, nil, 1))
	if !ok || !x.ours() || x.stands(&seed, anchorOf(&seed, false)) {
		t.Errorf("%+v", x)
	}
}

func TestParseExpectation(t *testing.T) {
	littleEndian(t)
	for _, tt := range []struct {
		name string
		b    []byte
		want cone.Permission
	}{{"translated", goldenExpectation, seed}, {"routed", goldenRouted, routed}} {
		t.Run(tt.name, func(t *testing.T) {
			x, ok := parseExpectation(tt.b)
			if !ok || !x.ours() || !x.stands(&tt.want, anchorOf(&tt.want, false)) || x.timeout != 60 {
				t.Errorf("%+v", x)
			}
			if diff := cmp.Diff(tt.want, x.permission()); diff != "" {
				t.Error(diff)
			}
			// A truncated message must not pass for another expectation.
			for n := range len(tt.b) {
				if x, ok := parseExpectation(tt.b[:n:n]); ok && x.ours() && x.permission() != tt.want {
					t.Errorf("%d bytes: %+v", n, x)
				}
			}
		})
	}
}

func TestParseAnchor(t *testing.T) {
	littleEndian(t)
	b := goldenAnchor
	if a, mark, ok := parseAnchor(b); !ok || a != anchorOf(&zoned, false) || mark != 0x2a {
		t.Errorf("%+v with mark %#x, %v", a, mark, ok)
	}
	for n := range len(b) {
		if a, _, ok := parseAnchor(b[:n:n]); ok && a != anchorOf(&zoned, false) {
			t.Errorf("%d bytes: %+v", n, a)
		}
	}
}

func TestWhatIsNotOurs(t *testing.T) {
	for name, change := range map[string]func(x *expectation){
		"of another protocol":       func(x *expectation) { x.udp = false },
		"on a TCP master":           func(x *expectation) { x.masterUDP = false },
		"on another peer's master":  func(x *expectation) { x.master[1].Addr[15]++ },
		"on another host's master":  func(x *expectation) { x.master[0].Addr[15]++ },
		"on a real flow":            func(x *expectation) { x.master[0].Port = 5060 },
		"on a master without ports": func(x *expectation) { x.master[1].Port = 0 },
		"on another port's master":  func(x *expectation) { x.master[1].Port++ },
		"used up by one packet":     func(x *expectation) { x.flags = 0 },
		"from one port":             func(x *expectation) { x.src.Port = 5060 },
		"translated to another":     func(x *expectation) { x.nat.Addr[15]++ },
		"not translated":            func(x *expectation) { x.nat = cone.Endpoint{} },
	} {
		t.Run(name, func(t *testing.T) {
			x := expectation{
				src: cone.Endpoint{Addr: seed.Peer}, dst: seed.Ext, nat: seed.Int,
				flags: expectPermanent, udp: true, masterUDP: true,
			}
			x.master[0], x.master[1] = anchorOf(&seed, false).endpoints()
			if !x.ours() {
				t.Fatal("the seed itself is not")
			}
			change(&x)
			if x.ours() {
				t.Errorf("taken for ours: %+v", x)
			}
		})
	}
	littleEndian(t)
	for name, change := range map[string]struct {
		at int
		to byte
	}{
		"TCP": {4 + 32, 6}, "without a port 0": {4 + 40, 1}, "not assured": {4 + 119, 8}, "no helper": {4 + 154, 0x7f},
	} {
		t.Run(name, func(t *testing.T) {
			b := append([]byte(nil), goldenAnchor...)
			b[change.at] = change.to
			if a, _, ok := parseAnchor(b); ok {
				t.Errorf("taken for ours: %+v", a)
			}
		})
	}
}

func FuzzParseExpectation(f *testing.F) {
	f.Add(goldenExpectation)
	f.Add(goldenRouted)
	f.Add(goldenAnchor)
	f.Fuzz(func(t *testing.T, b []byte) {
		if a, _, ok := parseAnchor(b); ok {
			src, dst := a.endpoints()
			if !cone.IsAnchor(src, dst) {
				t.Errorf("anchor from %v to %v", src, dst)
			}
		}
		x, ok := parseExpectation(b)
		if !ok || !x.ours() {
			return
		}
		// What is ours must be found again by its permission: otherwise it would be listed
		// for ever and could never be revoked.
		p := x.permission()
		l := newLedger(1)
		l.take(x.anchor(), &p)
		if a, stands, _ := l.of(&p); !stands || x.stands(&p, a) != x.helped() {
			t.Errorf("%+v is not found again", x)
		}
	})
}
