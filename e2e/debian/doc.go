// Package debian gets packages of any Debian release for tests: downloaded from the
// archive that this machine's apt uses, unpacked below the user's cache and never
// installed. apt checks the signatures and checksums.
//
// It needs a Debian system with apt-get and dpkg-deb.
package debian
