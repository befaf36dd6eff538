"""What lies in a PC's memory before its first instruction: firmware tables, parameter page, and the booted image."""

import os
from typing import NamedTuple

from kvmpy.kvm import Vcpu
from kvmpy.machine import acpi, mptable, params, x86
from kvmpy.machine.boot.detect import boot_image, detect, open_image, protocol
from kvmpy.machine.boot.plan import BootOptions, CpuMode, Entry
from kvmpy.machine.memory import GuestMemory
from kvmpy.pc.linux import LINUX_PROTOCOLS, Word, added_words, is_linux, ring_0_is_slow
from kvmpy.pc.spec import Announcement, MachineSpec


class Loaded(NamedTuple):
    """What was loaded how: by which protocol, with which options, and the words that are ours in the command line."""

    entry: Entry
    title: str
    options: BootOptions
    words: tuple[Word, ...]
    slow_linux: bool
    """It is Linux, and this host's KVM emulates its ring 0."""

    @property
    def cmdline(self) -> str:
        """The command line that the kernel gets."""
        return self.options.linux_cmdline


def write_tables(spec: MachineSpec, memory: GuestMemory, identity: bytes) -> None:
    """Write the firmware's tables and the parameter page."""
    windows = spec.virtio_windows
    mptable.write(memory, spec.cores)
    acpi.write(memory, spec.cores, windows if spec.virtio is Announcement.ACPI else ())
    parameters = params.Parameters(spec.name, identity, dict(spec.parameters))
    params.write(memory, spec.cores, parameters, spec.disk_windows)


def load_image(spec: MachineSpec, memory: GuestMemory) -> Loaded:
    """Load the image of ``spec``, behind the tables, which some protocols look for. Raises ImageError, ValueError."""
    options = spec.boot_options
    chosen = protocol(options.format) if options.format is not None else None
    with open_image(os.fspath(spec.boot), options, limit=memory.size) as image:
        chosen = chosen or detect(image)
        words = added_words(spec, chosen, image)
        slow_linux = chosen.TITLE in LINUX_PROTOCOLS and is_linux(image) and ring_0_is_slow()
        options = options._replace(devices=tuple(word.text for word in words), unpack=options.unpack or slow_linux)
        entry = boot_image(image, memory, options)
    x86.write_boot_tables(memory, long=entry.mode is CpuMode.LONG)
    return Loaded(entry, chosen.TITLE, options, words, slow_linux)


def start(vcpu: Vcpu, entry: Entry) -> None:
    """Set the first vCPU's registers as the boot protocol says."""
    if entry.mode is CpuMode.REAL:
        x86.real_mode(vcpu, entry.rip)
    elif entry.mode is CpuMode.PROTECTED:
        x86.protected_mode(vcpu, entry.rip)
    else:
        x86.long_mode(vcpu, entry.rip)
    with vcpu.edit_regs() as regs:
        for name, value in entry.registers.items():
            setattr(regs, name, value)
