// Package nftversions proves that every nft can list, save and load conenatd's rules,
// and that the other tools of netfilter work beside them.
//
// The versions of nft are those of Debian's releases, from bullseye (0.9.8) to sid,
// unpacked below the user's cache and not installed. Ubuntu's 1.0.2 (22.04) and 1.0.9
// (24.04) are not in Debian's archive, nor in its backports: they are tried by hand, with
// CONENATD_NFT="PATH PATH", which names more programs.
package nftversions

import (
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
)

func TestMain(m *testing.M) { stage.Main(m) }
