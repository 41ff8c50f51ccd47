#!/bin/sh
# Runs in the guest, after init.sh, with the host's programs: takes command
# lines from the second serial port, answers there with the exit status, and
# sends what they print to the third, with a NUL byte at the end.
. /run/job/environment

stty -F /dev/ttyS1 raw -echo
stty -F /dev/ttyS2 raw -echo
exec 3<>/dev/ttyS1 4>/dev/ttyS2

ip link set lo up
modprobe tun # makes /dev/net/tun
echo ready >&3
while read -r line <&3; do
	sh -c "$line" </dev/null >&4 2>&4 3>&-
	status=$?
	printf '\0' >&4
	echo "$status" >&3
done
