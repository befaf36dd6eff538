"""What a kernel with everything finds on the board: disk, clock, entropy, console, and the power button.

It is not among those that tests always have: ``make linux-guest`` builds it.
"""

import re
import threading
import time
from pathlib import Path

import linux_runs
from linux_runs import command, initramfs, kernel
from linux_terminal import CTRL_A, PROMPT, Terminal

from kvmpy import Disk, MachineSpec, Pc
from kvmpy.machine.boot.plan import BootOptions
from kvmpy.machine.machine import EndReason

pytestmark = linux_runs.pytestmark

MARK = b"the first sector\n"
WRONG = re.compile(r"ACPI (BIOS )?(Error|Warning|Exception)|\bAE_[A-Z_]+|virtio.*(fail|error)", re.IGNORECASE)
FAR = 100
"""Seconds: the guest's clock starts with the host's, to the second, and no further off than a slow host makes it."""


def disk(tmp_path: Path) -> Path:
    image = tmp_path / "disk.img"
    image.write_bytes(MARK.ljust(1 << 20, b"\0"))
    return image


def test_acpi_tells_of_every_device_and_the_monitor_presses_the_power_button(tmp_path: Path) -> None:
    """With a shell on hvc0; its end is an ACPI power-off."""
    options = ("--virtio", "acpi", "--disk", f"{disk(tmp_path)},format=raw", "--rng", "--console", "virtio")
    initrd = initramfs(tmp_path / "i.cpio", "busybox")
    append = "console=ttyS0 console=hvc0 quiet panic=-1"
    with Terminal(command(kernel("vmlinux-full"), "-i", "--initrd", initrd, *options, append=append)) as terminal:
        terminal.until(PROMPT)
        assert terminal.obey("tty") == "/dev/hvc0\n"
        assert terminal.obey("ls -d /sys/bus/acpi/devices/LNRO* | wc -l") == "3\n"
        assert "virtio_mmio.device" not in terminal.obey("cat /proc/cmdline")
        assert terminal.obey("head -n 1 /dev/vda").encode() == MARK
        assert terminal.obey("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"
        assert terminal.obey("head -c 99 /dev/hwrng | wc -c") == "99\n"
        assert abs(int(terminal.obey("date +%s")) - time.time()) < FAR
        assert abs(int(terminal.obey("cat /sys/class/rtc/rtc0/since_epoch")) - time.time()) < FAR
        messages = terminal.obey("dmesg")
        assert "rtc_cmos 00:01: setting system clock to " in messages
        assert [line for line in messages.splitlines() if WRONG.search(line)] == []
        terminal.type(f"{CTRL_A}c")
        terminal.until("(kvmpy) ")
        terminal.type("stop\r")
        assert terminal.end() == 0
    assert "reboot: Power down" in terminal.screen


def test_stop_request_presses_the_power_button(tmp_path: Path) -> None:
    """Devices are on the command line; two processors."""
    options = BootOptions(append="console=ttyS0 quiet panic=-1", initrd=str(initramfs(tmp_path / "i.cpio", "busybox")))
    spec = MachineSpec(
        kernel("vmlinux-full"), cores=2, boot_options=options, disks=[Disk(str(disk(tmp_path)), format="raw")], rng=True
    )
    seen, ready = bytearray(), threading.Event()

    def hear(data: bytes) -> None:
        seen.extend(data)
        if b"ready 2" in seen:
            ready.set()

    with Pc(spec, serial=hear) as pc:
        assert pc.loaded.cmdline.count("virtio_mmio.device=") == 2
        stopper = threading.Thread(target=lambda: ready.wait(linux_runs.TIME_LIMIT) and pc.request_stop())
        stopper.start()
        pc.serial.feed(b"head -n 1 /dev/vda; head -c 99 /dev/hwrng | wc -c; dmesg; echo ready `nproc`\n")
        result = pc.run(timeout=linux_runs.TIME_LIMIT)
        ready.set()
        stopper.join()
    lines = result.serial.replace("\r", "").splitlines()
    assert (result.reason, result.status) == (EndReason.POWER_OFF, 0), lines
    assert {MARK.decode().strip(), "99", "ready 2"} <= set(lines)
    assert [line for line in lines if WRONG.search(line)] == []
