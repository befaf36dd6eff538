"""A FLUSH that was acknowledged is kept, whenever the power fails: on every kind of image, by both engines.

With writethrough, so is each write that was completed.
"""

from functools import partial
from pathlib import Path

import pytest
from engine_judge import judge
from engine_story import SETUPS, Setup
from power_cuts import check_defects, check_sound
from recording import Op, ready

each_setup = pytest.mark.parametrize("setup", SETUPS, ids=[setup.name for setup in SETUPS])


@each_setup
def test_power_cut_loses_nothing_that_was_flushed(setup: Setup, engine_ops: dict[str, list[Op]], disk: Path) -> None:
    """virtio 1.2 §5.2.6.2: a write is stable when a FLUSH is done that was sent after the write was done, or, where
    the cache is in writethrough mode, when the write itself is; before it says so the device MUST commit it."""
    ops = engine_ops[setup.name]
    check_sound(partial(judge, setup), disk, ops, ready(ops), recent=2, samples=1)


@each_setup
def test_defects_of_engine_and_image_are_seen(setup: Setup, engine_ops: dict[str, list[Op]], disk: Path) -> None:
    """One sync of the engine or the image less, or one change of metadata too early: some power cut shows it."""
    ops = engine_ops[setup.name]
    check_defects(partial(judge, setup), disk, ops, ready(ops))
