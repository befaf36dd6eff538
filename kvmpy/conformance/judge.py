"""The judge: runs a variant on a bench of its own, and says what came of it, whatever was expected.

Checked for every variant: the host lives and raised nothing; guest memory outside the buffers that were given and the
used rings is unchanged; the disk holds what the model of it holds, and the bytes around it in its files are unchanged;
another disk beside it still serves a read; every chain that was consumed came back, or the device says
DEVICE_NEEDS_RESET; after a reset the device serves a read; the log stayed short.
"""

from typing import NamedTuple

from kvmpy.conformance.bench import Bench
from kvmpy.conformance.case import IGNORED, REFUSED, STATUSES, Variant, Verdict, verdict_of
from kvmpy.conformance.image import pattern
from kvmpy.devices.block import MakeEngine
from kvmpy.errors import KvmUnavailable

LOG_LINES = 16
"""What a hostile driver may make us log, at most."""
OTHER_SECTOR = 9


class Judgement(NamedTuple):
    """What came of a variant: ``answer`` as the case's words have it, ``detail`` why it is a defect."""

    verdict: Verdict
    answer: str
    detail: str = ""


def judge(variant: Variant, make_engine: MakeEngine, other: Bench, *, packed: bool) -> Judgement:
    """Run ``variant`` on one engine and one kind of ring; ``other`` is the disk beside it, started."""
    with Bench(make_engine, packed=packed, world=variant.world) as bench:
        bench.start()
        try:
            variant.run(bench)
        except KvmUnavailable as error:
            return Judgement(Verdict.SKIP, "", str(error))
        except Exception as error:
            return Judgement(Verdict.FAIL, "", f"it raised {type(error).__name__}: {error}")
        return _look(bench, other)


def _look(bench: Bench, other: Bench) -> Judgement:
    answer = _answer(bench)
    harm = [*bench.harm, *_disk_harm(bench), *_host_harm(bench)]
    if other.driver.read(OTHER_SECTOR) != pattern(OTHER_SECTOR):
        harm.append("another disk no longer serves reads")
    if harm:
        return Judgement(Verdict.FAIL, answer, "; ".join(harm))
    if bench.outstanding and not bench.driver.needs_reset:
        return Judgement(Verdict.WEDGED, answer, f"{bench.outstanding} chains did not come back")
    if not _answers_after_reset(bench):
        return Judgement(Verdict.WEDGED, answer, "no read is served after a reset")
    return Judgement(verdict_of(answer), answer)


def _answer(bench: Bench) -> str:
    """Return the device's answer in words: what broke it, or the different statuses it gave."""
    if bench.driver.needs_reset:
        return f"NEEDS_RESET {bench.device.fault.name}" if bench.device.fault else "NEEDS_RESET"
    if bench.refusals:
        return REFUSED
    names = (STATUSES.get(status, f"status 0x{status:x}") for status in bench.answers)
    return ", ".join(dict.fromkeys(names)) or IGNORED


def _disk_harm(bench: Bench) -> list[str]:
    harm = []
    if bench.image.contents() != bytes(bench.model.disk):
        harm.append("the disk does not hold what it must")
    if not bench.image.is_intact():
        harm.append("a byte around the disk was written")
    return harm


def _host_harm(bench: Bench) -> list[str]:
    harm = [f"a worker raised {type(error).__name__}: {error}" for error in bench.errors]
    if bench.log.count > LOG_LINES:
        harm.append(f"{bench.log.count} lines were logged")
    return harm


def _answers_after_reset(bench: Bench) -> bool:
    try:
        bench.start()
    except ValueError:
        return False
    return bench.driver.read(bench.readable_sector) == bench.model.sector(bench.readable_sector)
