"""What a case is: a number, a title, and variants that each say what they expect.

The numbers are those of docs/conformance.md; T and B numbers name the same case in the public virtio-villain suite.
"""

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import NamedTuple

from kvmpy._shim import lib
from kvmpy.conformance.bench import Bench
from kvmpy.conformance.world import World
from kvmpy.devices.virtqueue import Fault


class Verdict(StrEnum):
    """What came of a variant, from the best to the worst. SKIP is none."""

    SKIP = "SKIP"
    """It could not be run here."""
    PASS = "PASS"
    """It was served, as the specification says."""
    REJECT = "REJECT"
    """It was refused: an error status, DEVICE_NEEDS_RESET, a register that did not take."""
    WEDGED = "WEDGED"
    """The device stopped answering. A defect."""
    FAIL = "FAIL"
    """Harm was done: to the host, to memory or disk that was not given, to another disk. A defect."""


DEFECTS = (Verdict.WEDGED, Verdict.FAIL)
ORDER = tuple(Verdict)

OK, IOERR, UNSUPP = "OK", "IOERR", "UNSUPP"
REFUSED = "refused"
"""A register did not take what was written: FEATURES_OK, QueueReady."""
IGNORED = "ignored"
"""Nothing was consumed, and nothing happened."""

RINGS = ("split", "packed")
STATUSES = {lib.VIRTIO_BLK_S_OK: OK, lib.VIRTIO_BLK_S_IOERR: IOERR, lib.VIRTIO_BLK_S_UNSUPP: UNSUPP}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst of them; SKIP where there are none."""
    return max(verdicts, key=ORDER.index, default=Verdict.SKIP)


def needs_reset(fault: Fault) -> str:
    """Return the answer of a device that says DEVICE_NEEDS_RESET because of ``fault``."""
    return f"NEEDS_RESET {fault.name}"


def verdict_of(answer: str) -> Verdict:
    """Return the verdict of a device that gave ``answer``, and did no harm."""
    return Verdict.PASS if answer in (OK, IGNORED) else Verdict.REJECT


class Variant(NamedTuple):
    """One way to be hostile: ``run`` does it, on a bench that is set up like ``world``; ``answer`` shall come of it."""

    name: str
    answer: str
    run: Callable[[Bench], None]
    world: World = World()
    rings: tuple[str, ...] = RINGS
    needs_kvm: bool = False
    """It has vCPUs, and is skipped where there is no KVM."""

    @property
    def expected(self) -> Verdict:
        """The verdict that goes with the answer."""
        return verdict_of(self.answer)


class Case(NamedTuple):
    """A case, with the same case's names in virtio-villain."""

    number: int
    title: str
    villain: str
    variants: tuple[Variant, ...]

    @property
    def expected(self) -> str:
        """The worst verdict that is expected of its variants; for split and for packed rings where they differ."""
        rings = ({v.expected for v in self.variants if ring in v.rings} for ring in RINGS)
        return "/".join(dict.fromkeys(worst(verdicts) for verdicts in rings if verdicts))
