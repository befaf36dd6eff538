#!/bin/busybox sh
# The first process of Debian's stock kernel, as /init: it loads the modules of /modules, mounts /dev/vda on /mnt if
# there is such a disk, and gives a shell on the console. Words behind `--` on the kernel's command line are run in its
# place. Then it powers the machine off.
if [ $$ != 1 ]; then
    echo "$0: only as the first process of a guest: it mounts, and it ends the machine" >&2
    exit 1
fi
echo "init: the first process"
export PATH=/bin:/sbin HOME=/ TERM=${TERM:-linux}
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev

while read -r module; do
    insmod "/modules/$module" && echo "init: module $module"
done </modules/order

if [ -b /dev/vda ]; then
    mount -t ext4 /dev/vda /mnt && echo "init: /dev/vda is mounted"
fi

read -r seconds _ </proc/uptime
echo "init: a shell after $seconds s of the guest's clock"
if [ $# -gt 0 ]; then
    sh -c "$*"
else
    echo "exit, or poweroff -f, ends the machine"
    setsid cttyhack sh
fi
echo "init: the end"
umount /mnt 2>/dev/null
/bin/busybox poweroff -f
