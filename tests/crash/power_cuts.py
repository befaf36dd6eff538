"""Tries power cuts: each point of a recording, and what the disk may show there, is built and judged."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

from crash_states import Cut, build, effect, marks, random_cuts, simple_cuts, single_cuts
from defects import Defect, one_of_each_site, planted
from recording import SYNC, Op

from kvmpy.errors import DiskError

SEED = 20261120
CAMPAIGN = "KVMPY_CAMPAIGN" in os.environ

Judge = Callable[[Path, list[str]], str | None]
"""What is wrong with what a folder holds, after these marks; None: nothing."""


class PowerCuts:
    """Has ``judge`` look at what cuts leave in the folder ``disk``; ``tried`` says at how many.

    At each point ``recent`` changes are lost, and kept, alone, and ``samples`` mixtures are tried.
    """

    def __init__(self, judge: Judge, disk: Path, *, recent: int = 12, samples: int = 4) -> None:
        self._judge, self._disk = judge, disk
        self._recent, self._samples = recent, samples
        self.tried = 0

    def failures(self, ops: Sequence[Op], points: range) -> Iterator[str]:
        """Yield what is wrong after the cuts behind so many operations."""
        seen = set()
        for cut in self._cuts(ops, points):
            key = effect(ops, cut)
            if key not in seen:
                seen.add(key)
                problem = self._problem(ops, cut)
                if problem is not None:
                    yield f"{cut}, behind {ops[cut.at - 1] if cut.at else 'nothing'}: {problem}"

    def _cuts(self, ops: Sequence[Op], points: range) -> Iterator[Cut]:
        """Yield the cuts at all points, those that show most defects first."""
        random = Random(SEED)
        for at in points:
            yield from simple_cuts(ops, at)
        for at in points:
            yield from single_cuts(ops, at, self._recent)
        for at in points:
            yield from random_cuts(ops, at, random, self._samples)

    def _problem(self, ops: Sequence[Op], cut: Cut) -> str | None:
        shutil.rmtree(self._disk, ignore_errors=True)
        self._disk.mkdir()
        build(ops, cut, self._disk)
        self.tried += 1
        try:
            return self._judge(self._disk, marks(ops, cut.at))
        except (DiskError, OSError) as error:
            return f"{type(error).__name__}: {error}"


def check_sound(judge: Judge, disk: Path, ops: Sequence[Op], start: int = 0, *, recent: int, samples: int) -> None:
    """Assert that every cut from ``start`` on leaves what was promised. In a campaign there are far more of them."""
    power_cuts = PowerCuts(judge, disk, recent=1000 if CAMPAIGN else recent, samples=100 if CAMPAIGN else samples)
    found = list(power_cuts.failures(ops, range(start, len(ops) + 1)))
    syncs = sum(op.kind == SYNC for op in ops[start:])
    print(f"\n{len(ops) - start} operations, {syncs} syncs, {power_cuts.tried} cuts, seed {SEED}")
    assert found == []


def check_defects(judge: Judge, disk: Path, ops: Sequence[Op], start: int = 0) -> None:
    """Assert that each planted defect is seen: in a campaign wherever the program passes by, else once a site."""
    defects = list(planted(ops, start))
    tried = defects if CAMPAIGN else one_of_each_site(defects)
    power_cuts = PowerCuts(judge, disk)
    unseen = [defect for defect in tried if not _is_seen(defect, power_cuts)]
    print(f"\n{len(tried)} planted defects, {power_cuts.tried} cuts, seed {SEED}")
    print(*(defect.name for defect in tried), sep="\n")
    assert [defect.name for defect in unseen] == []


def _is_seen(defect: Defect, power_cuts: PowerCuts) -> bool:
    return next(power_cuts.failures(defect.ops, defect.points), None) is not None
