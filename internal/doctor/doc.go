// Package doctor says what is wrong with a gateway, why it matters, and which line repairs
// it. It is pure: facts in, findings out. Package collect reads the facts.
//
// Most findings are the daemon's own (control.Finding), of a daemon that runs or of one that
// only examined the gateway. This package adds their severity, their meaning and the line in
// the language of the firewall in use, and has a few findings that need no daemon.
package doctor
