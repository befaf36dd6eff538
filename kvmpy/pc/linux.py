"""What Linux is told beyond what the user says: words behind the command line, each with its reason.

Two kinds. Devices that it cannot find by itself. And what a host's KVM does wrong in ring 0 without anybody
noticing: an instruction whose execution brings no exit cannot be completed, so the kernel is told to do without. What
is wrong is found by the probes. A host whose processor executes ring 0 itself does all of it right, and adds no word.

Source: Linux, Documentation/admin-guide/kernel-parameters.txt (clearcpuid=), arch/x86/kernel/cpu/common.c
(cpu_parse_early_param), arch/x86/include/asm/cpufeatures.h.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from kvmpy.machine import layout
from kvmpy.machine.boot.detect import BootProtocol
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.plan import BootOptions
from kvmpy.pc.spec import Announcement, Console, MachineSpec

LINUX_PROTOCOLS = ("bzImage", "PVH")
"""The titles of those that serve `BootOptions.devices`."""
CLEARCPUID = "clearcpuid="
NATIVE_RING_0 = "native-cpl0"
SYSCALL = "syscall-cpl3"
"""Not asked here: `Completer` will, as soon as Linux sets it up."""


class Word(NamedTuple):
    """A word of the command line, and why it stands there."""

    text: str
    why: str


class Feature(NamedTuple):
    """A feature of the processor that Linux shall not use where the host lacks ``ability``."""

    ability: str
    number: int
    """X86_FEATURE_*: 32 times the word, and the bit."""
    why: str


FEATURES = (
    Feature("rdpid-cpl0", 16 * 32 + 22, "rdpid raises #UD"),
    Feature("movbe-cpl0", 4 * 32 + 22, "movbe raises #UD"),
    Feature("lzcnt-cpl0", 6 * 32 + 5, "lzcnt runs as bsr"),
    Feature("tzcnt-cpl0", 9 * 32 + 3, "tzcnt (BMI1) runs as bsf"),
    # Not avx512f: the kernel would save no AVX-512 registers any more, and programs use them all the same.
    Feature("native-cpl0", 9 * 32 + 31, "AVX-512 (avx512vl) is not completed"),
)


def added_words(spec: MachineSpec, protocol: BootProtocol, image: ImageFile) -> tuple[Word, ...]:
    """Return what is added to the command line that ``spec`` says, for ``image`` booted by ``protocol``."""
    if spec.append_exact or protocol.TITLE not in LINUX_PROTOCOLS:
        return ()
    devices: tuple[Word, ...] = ()
    if spec.virtio is Announcement.CMDLINE:
        words = layout.virtio_cmdline(spec.virtio_windows)
        devices = tuple(Word(word, "where a virtio device is") for word in words)
    return devices + (host_words(_has, spec.boot_options) if is_linux(image) and ring_0_is_slow() else ())


def untold_devices(spec: MachineSpec, title: str, cmdline: str) -> tuple[str, ...]:
    """Return the virtio devices of ``spec`` that nobody tells Linux of; ``title`` is that of its boot protocol.

    That is what ``append_exact`` leaves out, unless the user has said it in ``cmdline``.
    """
    tells = spec.virtio is Announcement.ACPI or not spec.append_exact or "virtio_mmio.device=" in cmdline
    if tells or title not in LINUX_PROTOCOLS:
        return ()
    disks = {0: (), 1: ("disk",)}.get(len(spec.disks), ("disks",))
    rng = ("entropy device",) if spec.rng else ()
    return (*disks, *rng, *(("console",) if spec.console is Console.VIRTIO else ()))


def host_words(has: Callable[[str], bool], options: BootOptions) -> tuple[Word, ...]:
    """Return what this host demands; ``has`` tells an ability.

    Linux obeys the last ``clearcpuid=`` alone. So ours, which stands behind the user's, says what that says too;
    the host's numbers first, because the kernel reads no more than 127 characters.
    """
    wrong = [feature for feature in FEATURES if not has(feature.ability)]
    if not wrong:
        return ()
    numbers = [str(feature.number) for feature in wrong]
    said = re.findall(rf"(?:^|\s){CLEARCPUID}(\S*)", options.append)
    numbers += [number for number in (said[-1].split(",") if said else ()) if number and number not in numbers]
    why = f"in ring 0 of this host {', '.join(feature.why for feature in wrong)}"
    return (Word(CLEARCPUID + ",".join(numbers), why),)


def is_linux(image: ImageFile) -> bool:
    """Tell whether ``image`` is a Linux kernel."""
    from kvmpy.machine.boot.linux import linux_version

    return linux_version(image) is not None


def ring_0_is_slow() -> bool:
    """Tell whether this host's KVM emulates ring 0: whatever the host can do for a kernel is then worth doing."""
    return not _has(NATIVE_RING_0)


def _has(ability: str) -> bool:
    from kvmpy.machine.probe import has, learn  # which makes a VM of its own: other guests need none of it

    learn([SYSCALL, *(feature.ability for feature in FEATURES)], unless=NATIVE_RING_0)
    return has(ability)
