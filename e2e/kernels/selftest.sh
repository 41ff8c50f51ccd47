#!/bin/sh
# The first program of a guest of another machine, which has no files but the initramfs. Runs
# the selftest there, and says on the console how it ended.
# No "set -e": if this script ends, the kernel panics and QEMU exits.
export PATH=/bin:/sbin HOME=/
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp

conenatd selftest
echo "selftest: exit status $?"
stty -F /dev/console sane # once all of it is out
poweroff -f
