// Package packages tests the Debian package in a container with Debian 12 and systemd, whose
// network is the gateway of a lab. "make packages-test" starts it.
package packages
