"""What is said of a run: lines for ``-v``, tables for ``--stats`` and fields for ``--json``."""

import os
from typing import TYPE_CHECKING, Any

from kvmpy.cli.messages import one_line
from kvmpy.errors import KvmError
from kvmpy.pc import OnReboot, Pc, RunResult
from kvmpy.pc.dedicated import describe_exits
from kvmpy.units import format_size

if TYPE_CHECKING:
    from kvmpy.devices.block import BlockCounters
    from kvmpy.pc.disks import AttachedDisk


def stats_text(pc: Pc, result: RunResult) -> str:
    """Return exits by reason, accesses by device, and times, as aligned lines for people."""
    last = " of the last boot" if result.restarts else ""
    lines = [f"exits by reason{last}"]
    for reason, count in sorted(result.exits.items(), key=lambda item: -item[1]):
        lines.append(f"  {reason:<23} {count:>12}")
    lines += [f"  {'total':<23} {result.exits_total:>12}", ""]
    lines.append(f"  {'device':<10} {'address':<12} {'reads':>12} {'writes':>12}")
    for use in result.ranges:
        if use.reads or use.writes:
            lines.append(f"  {use.name:<10} {span(use.base, use.size):<12} {use.reads:>12} {use.writes:>12}")
    lines.append(f"  {'nobody':<10} {'':<12} {result.unmapped_reads:>12} {result.unmapped_writes:>12}")
    lines += disk_lines(result) + assist_lines(result)
    if pc.spec.on_reboot is OnReboot.RESTART:
        lines += ["", f"  {'restarts':<23} {result.restarts:>12}"]
    lines += ["", f"time in seconds{last}", f"  {'wall':<23} {result.seconds:>12.6f}"]
    vcpus = "" if pc.spec.cores == 1 else f" ({pc.spec.cores} vCPUs)"
    lines.append(f"  {'in the guest' + vcpus:<23} {result.seconds_in_guest:>12.6f}")
    lines.append(f"  {'out of it' + vcpus:<23} {seconds_out(pc, result):>12.6f}")
    return "\n".join(lines) + "\n"


def disk_lines(result: RunResult) -> list[str]:
    """Return a table of what the guest did with each disk; nothing where there is none."""
    if not result.disks:
        return []
    head = f"  {'disk':<10} {'requests':>12} {'bytes read':>14} {'bytes written':>14} {'flushes':>10} {'errors':>8}"
    lines = ["", head]
    for use in result.disks:
        done, name = use.counters, one_line(os.path.basename(use.path))
        lines.append(
            f"  {name:<10} {requests(done):>12} {done.bytes_read:>14} {done.bytes_written:>14} "
            f"{done.flushes:>10} {done.errors:>8}"
        )
    return lines


def assist_lines(result: RunResult) -> list[str]:
    """Return a table of what was completed for the host's KVM; nothing where nothing had to be."""
    if not result.assists:
        return []
    rows = [f"  {name:<23} {count:>12}" for name, count in most_used(result)]
    return ["", "completed for the host's KVM", *rows]


def most_used(result: RunResult) -> list[tuple[str, int]]:
    """Return what was completed for the host's KVM and how often, the most frequent first."""
    return sorted(result.assists.items(), key=lambda item: -item[1])


def requests(counters: "BlockCounters") -> int:
    """Return how many requests were completed, of all kinds."""
    return counters.reads + counters.writes + counters.flushes + counters.others


def span(base: int, size: int) -> str:
    """Return a range of addresses: ``0xf4-0xf7``."""
    return f"0x{base:x}" + (f"-0x{base + size - 1:x}" if size > 1 else "")


def seconds_out(pc: Pc, result: RunResult) -> float:
    """Return the time that the vCPUs, together, spent outside KVM_RUN."""
    return max(0.0, result.seconds * pc.spec.cores - result.seconds_in_guest)


def as_dict(pc: Pc, result: RunResult) -> dict[str, Any]:
    """Return the run as plain values for JSON; times in seconds, those of all vCPUs added up."""
    from kvmpy import __version__

    return {
        "kvmpy": __version__,
        "host": host_line(),
        "file": os.fspath(pc.spec.boot),
        "cores": pc.spec.cores,
        "memory": pc.spec.memory,
        "status": result.status,
        "reason": str(result.reason),
        "message": result.message,
        "panic": result.panic,
        "last_words": list(result.last_words),
        "restarts": result.restarts,
        "vcpu_id": result.end.vcpu_id,
        "value": result.end.value,
        "exits": result.exits,
        "exits_total": result.exits_total,
        "assists": result.assists,
        "ranges": [
            {"name": use.name, "base": use.base, "size": use.size, "reads": use.reads, "writes": use.writes}
            for use in result.ranges
        ],
        "disks": [
            {"path": use.path, "requests": requests(use.counters), **use.counters._asdict()} for use in result.disks
        ],
        "unmapped": {"reads": result.unmapped_reads, "writes": result.unmapped_writes},
        "seconds": result.seconds,
        "seconds_in_guest": result.seconds_in_guest,
        "seconds_out": seconds_out(pc, result),
        "registers": {str(vcpu_id): registers for vcpu_id, registers in result.registers.items()},
    }


def host_line() -> str:
    """Return what this host is, in one line: processor, kernel, and the modules that make its KVM."""
    from kvmpy.machine.probe.host import describe_host

    host = describe_host()
    modules = ", ".join(host.modules) or "KVM built in"
    return f"{host.cpu}, {len(os.sched_getaffinity(0))} CPUs, Linux {host.kernel}, {modules}"


def loaded_text(pc: Pc) -> str:
    """Return what was loaded how, in lines: the image and its protocol, memory, and what is dedicated."""
    spec, loaded, entry = pc.spec, pc.loaded, pc.entry
    lines = [f"{os.fspath(spec.boot)}: {loaded.title}, starts in {entry.mode} mode at 0x{entry.rip:x}"]
    lines += [f"{os.fspath(spec.boot)}: {note}" for note in entry.notes]
    if loaded.cmdline:
        lines.append(f"command line: {loaded.cmdline}")
    lines += [f"added to it: {word.text}: {word.why}" for word in loaded.words]
    places = ", ".join(span(region.gpa, region.size) for region in pc.memory.regions)
    lines.append(f"memory: {format_size(spec.memory)} at {places}, backed by {pc.memory.backing}")
    host_cpus = pc.dedication.vcpu_cpus if pc.dedication else spec.pin
    pinned = "".join(f", vCPU {vcpu_id} on host CPU {cpu}" for vcpu_id, cpu in enumerate(host_cpus))
    lines.append(f"vCPUs: {spec.cores}{pinned}")
    lines += [disk_line(disk) for disk in pc.disks]
    if pc.dedication:
        others = ", ".join(map(str, sorted(pc.dedication.host_cpus)))
        exits = describe_exits(pc.dedication.disable_exits)
        lines.append(f"dedicated: memory locked, other threads on host CPU {others}, exits disabled: {exits}")
    return "".join(f"kvmpy: {one_line(line)}\n" for line in lines)


def disk_line(disk: "AttachedDisk") -> str:
    """Return what a disk is and where the guest finds it, in one line."""
    spec = disk.spec
    image = f"{format_size(disk.size)}, {'read-only' if disk.readonly else spec.cache}, {spec.engine} engine"
    queues = f"{spec.queues} queue{'s' if spec.queues > 1 else ''}"
    return f"disk {disk.path}: {image}, {queues}, at 0x{disk.window.gpa:x}, GSI {disk.window.gsi}"


def ended_text(pc: Pc, result: RunResult) -> str:
    """Return what else is worth knowing of a run: accesses that nobody answered, and how KVM mapped the memory."""
    lines = [f"ended: {result.reason}, status {result.status}"]
    if result.unmapped_reads or result.unmapped_writes:
        lines.append(f"nobody answered {result.unmapped_reads} reads (all ones) and {result.unmapped_writes} writes")
    if result.assists:
        counts = ", ".join(f"{name} {count}" for name, count in most_used(result))
        lines.append(f"completed for the host's KVM: {counts}")
    try:
        stats = pc.machine.vm.get_stats()
        if stats["pages_4k"] or stats["pages_2m"]:
            lines.append(f"memory mapped: {stats['pages_4k']} pages of 4 KiB, {stats['pages_2m']} of 2 MiB")
    except (KvmError, KeyError):
        pass  # a kernel without binary statistics
    return "".join(f"kvmpy: {line}\n" for line in lines)
