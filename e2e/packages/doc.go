// Package packages tests the Debian and RPM packages in containers with Debian 12, whose
// network is the gateway of a lab. "make packages-test" starts it.
package packages
