#!/bin/sh
# The first program of the guest, run by busybox from the initramfs: makes a
# root of the host's file system, read-only, with a tmpfs over it.
# No "set -e": if this script ends, the kernel panics and QEMU exits.
PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev

# The list is in the order that the modules depend on each other.
for module in $(cat /modules/order); do
	insmod "/modules/$module"
done

# The host does not change the files during the run, so all caching will do.
share() {
	mkdir -p "$2"
	mount -t 9p -o "trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro" "$1" "$2"
}
share host /host
mkdir /over /new
mount -t tmpfs over /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work root /new || exec poweroff -f

# The kernel's modules, where the host's modprobe looks for them.
share modules "/new/lib/modules/$(uname -r)"

umount /sys /proc
mount --move /dev /new/dev
mount -t proc proc /new/proc
mount -t sysfs sysfs /new/sys
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts devpts /new/dev/pts
mount -t tmpfs -o mode=1777 tmp /new/dev/shm
# Not the host's sockets. Files in /tmp go to the tmpfs that lies over the root.
mount -t tmpfs -o mode=0755 run /new/run

# The test programs: copied, because paging them in over 9p is slow.
share job /job
mkdir /new/run/job
cp /job/* /new/run/job
umount /job

cp /bin/busybox /new/run/busybox
cp /serve.sh /new/run/serve.sh
exec switch_root /new /bin/sh /run/serve.sh
