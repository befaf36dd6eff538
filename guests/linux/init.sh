#!/bin/busybox sh
# The first process of a guest with Debian's busybox: as /init of an initramfs, or as /sbin/init.sh on a disk.
#
# Mounts what programs expect. With root=DEVICE on the kernel's command line an initramfs mounts that disk (with `ro`
# to be read only) and goes on with its /sbin/init.sh. Then a shell on the console, with Ctrl-C and jobs. When that
# shell ends, so does the machine: by a power-off where the kernel knows ACPI, else by a reset.
if [ $$ != 1 ]; then
    echo "$0: only as the first process of a guest: it mounts, and it ends the machine" >&2
    exit 1
fi
export PATH=/bin:/sbin HOME=/ TERM=${TERM:-linux}
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys 2>/dev/null # a small kernel has none
/bin/busybox mount -t devtmpfs devtmpfs /dev 2>/dev/null # on a disk the kernel has done it

root=
access=rw
read -r words </proc/cmdline
for word in $words; do
    case $word in
    root=*) root=${word#root=} ;;
    ro) access=ro ;;
    esac
done
if [ -n "$root" ] && [ "$0" = /init ]; then
    if mount -o "$access" "$root" /mnt && [ -x /mnt/sbin/init.sh ]; then
        umount /proc /sys /dev 2>/dev/null
        exec switch_root /mnt /sbin/init.sh
    fi
    echo "init: no /sbin/init.sh on $root: the shell of the initramfs" >&2
fi

end=reboot
if [ -d /sys/firmware/acpi ]; then
    end=poweroff
    acpid -l /dev/null 2>/dev/null # the power button: /etc/acpi/PWRF/00000080
fi

read -r seconds _ </proc/uptime
echo "init: a shell after $seconds s; exit, or: $end -f"
setsid cttyhack sh
sync
umount -a -r 2>/dev/null # /proc too, by which the shell finds busybox: from here it is named
/bin/busybox $end -f
