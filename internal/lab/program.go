package lab

import (
	"os/exec"
	"strings"
)

// program finds a program. On Debian, plain "su" leaves the sbin directories, with
// ip, nft and conntrack, out of root's PATH, so look there too.
func program(name string) (string, error) {
	for _, dir := range []string{"", "/usr/sbin/", "/sbin/"} {
		if path, err := exec.LookPath(dir + name); err == nil {
			return path, nil
		}
	}
	return name, missingError(name)
}

// missingError names a program that is not installed, and how to install it. It is
// an [exec.ErrNotFound].
type missingError string

func (e missingError) Error() string {
	text := string(e) + " not found"
	if pkg := e.debianPackage(); pkg != "" {
		text += ": install the Debian package " + pkg
	}
	return text
}

func (missingError) Unwrap() error { return exec.ErrNotFound }

func (e missingError) debianPackage() string {
	name := string(e)
	switch {
	case name == "ip":
		return "iproute2"
	case name == "nft":
		return "nftables"
	case name == "conntrack":
		return "conntrack"
	case strings.HasPrefix(name, "iptables"), strings.HasPrefix(name, "ip6tables"):
		return "iptables"
	}
	return ""
}
