"""What this host's KVM can do, found by trying: small guests run, and what they do is compared with a processor's.

Never by the host's name. A caller that needs one ability asks `has`, by the name in `Ability`::

    from kvmpy.machine.probe import has
    if has("int3-cpl0"): ...

`examine` asks for everything, for a report. Floor: machine.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kvmpy.errors import KvmError
from kvmpy.kvm import Kvm
from kvmpy.kvm.system import DEVICE
from kvmpy.machine.probe import capabilities, debugging, device, gates, host, instructions, interrupts, memory, modes
from kvmpy.machine.probe.bench import Bench
from kvmpy.machine.probe.finding import REQUIRED, Ability, Finding, Verdict
from kvmpy.machine.probe.host import Host, describe_host
from kvmpy.machine.probe.judge import Probe

__all__ = [
    "REQUIRED",
    "SECTIONS",
    "Ability",
    "Examination",
    "Finding",
    "Host",
    "Verdict",
    "examine",
    "has",
    "learn",
    "probe",
]

HOST_PROBES: dict[Ability, Callable[[str], Finding]] = {
    Ability.DEVICE: device.device,
    Ability.PERMISSION: device.permission,
    Ability.API_VERSION: device.api_version,
    Ability.CREATE_VM: device.create_vm,
    Ability.MODULE: host.module,
    Ability.CPU_FLAG: host.cpu_flag,
    Ability.BARE_METAL: host.bare_metal,
}
"""Those that need no guest, and get the device's path."""

GUEST_SECTIONS: dict[str, tuple[Probe, ...]] = {
    "capabilities": capabilities.PROBES,
    "processor modes": modes.PROBES,
    "instructions at CPL0": instructions.PROBES,
    "from CPL3 to the kernel": gates.ENTRIES,
    "hypercalls and CPUID": gates.HYPERCALLS,
    "guest debug": debugging.PROBES,
    "interrupts and cores": interrupts.PROBES,
    "memory and statistics": memory.PROBES,
}

SECTIONS: dict[str, tuple[Ability, ...]] = {
    "host": tuple(HOST_PROBES),
    **{title: tuple(probe.ability for probe in probes) for title, probes in GUEST_SECTIONS.items()},
}
"""Every ability once, under the title that a report gives it, in the report's order."""

_GUEST_PROBES = {probe.ability: probe for probes in GUEST_SECTIONS.values() for probe in probes}


@dataclass(frozen=True, slots=True)
class Examination:
    """All that was found. Where no VM can be made, only the host's own findings."""

    device: str
    host: Host
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def works(self) -> bool:
        """Tell whether kvmpy can run guests here."""
        fine = {found.name for found in self.findings if found.verdict in (Verdict.OK, Verdict.EMULATED)}
        return fine >= REQUIRED


def examine(path: str = DEVICE) -> Examination:
    """Probe everything, anew. Takes less than a second, and 50 ms more for each guest that hangs."""
    started = time.monotonic()
    findings = tuple(_find_all(path))
    return Examination(path, describe_host(), findings, time.monotonic() - started)


def _find_all(path: str) -> Iterator[Finding]:
    seen = [find(path) for find in HOST_PROBES.values()]
    yield from seen
    if any(found.name in REQUIRED and found.verdict is not Verdict.OK for found in seen):
        return
    with Kvm(path) as kvm, Bench(kvm) as bench:
        for probe in _GUEST_PROBES.values():
            yield probe.find(bench)


_known: dict[Ability, Finding] = {}


def probe(name: str) -> Finding:
    """Return the finding on one ability of ``/dev/kvm``; the second time, what was found the first time.

    Where there is no usable KVM, the verdict is UNKNOWN.

    Raises:
        ValueError: no ability has this name.
    """
    ability = Ability(name)
    if ability not in _known:
        _known[ability] = _find(ability)
    return _known[ability]


def has(name: str) -> bool:
    """Tell whether this host has an ability in full: natively, where that is the question (`Ability.NATIVE_CPL0`).

    Raises:
        ValueError: no ability has this name.
    """
    return probe(name).verdict is Verdict.OK


def learn(names: Iterable[str], *, unless: str | None = None) -> None:
    """Find those of ``names`` that are not known yet, in one VM: `probe` and `has` make one for each.

    Where the host has the ability ``unless``, which is looked for first, the others are not.

    Raises:
        ValueError: no ability has one of these names.
    """
    names = list(names) if unless is None else [unless, *names]
    unknown = [ability for ability in map(Ability, names) if ability not in _known and ability in _GUEST_PROBES]
    if not unknown:
        return
    try:
        with Kvm() as kvm, Bench(kvm) as bench:
            for ability in unknown:
                if unless is not None and unless in _known and _known[Ability(unless)].verdict is Verdict.OK:
                    return
                _known[ability] = _GUEST_PROBES[ability].find(bench)
    except KvmError as error:
        why = f"not tried: {error}"
        _known.update({ability: Finding(ability, Verdict.UNKNOWN, why) for ability in unknown})


def _find(ability: Ability) -> Finding:
    if ability in HOST_PROBES:
        return HOST_PROBES[ability](DEVICE)
    learn([ability])
    return _known[ability]
