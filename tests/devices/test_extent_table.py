"""The extent table against the plainest table there is: one entry for each sector."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.devices.extent_table import ExtentTable, Run
from kvmpy.storage.disk import SECTOR_SIZE, ZEROS, Extent

DISK = 24


def extent(sector, sectors, kind):
    """An extent of one of three files, or of none; each file holds the whole disk, so neighbours may continue."""
    if kind == ZEROS:
        return Extent(sector, sectors, ZEROS)
    return Extent(sector, sectors, kind, (sector + 100) * SECTOR_SIZE, writable=kind == 3, unaligned_fd=kind)


extents = st.builds(extent, st.integers(0, DISK - 1), st.integers(0, 9), st.sampled_from([ZEROS, 3, 4, 5]))


class Plain:
    """What is known of each sector."""

    def __init__(self):
        self.sectors = {}

    def splice(self, new):
        for sector in range(new.sector, new.end):
            offset = 0 if new.fd == ZEROS else new.offset + (sector - new.sector) * SECTOR_SIZE
            self.sectors[sector] = new._replace(sector=sector, sectors=1, offset=offset)

    def first_run(self, sector, sectors, wanted):
        """The first run of sectors that are ``wanted``."""
        run = []
        for at in range(sector, sector + sectors):
            if wanted(self.sectors.get(at)):
                run.append(at)
            elif run:
                break
        return Run(run[0], len(run)) if run else None


@given(st.lists(extents, max_size=12), st.integers(0, DISK), st.integers(0, DISK))
@settings(max_examples=300, deadline=None)
def test_table_knows_of_each_sector_what_was_said_last(spliced, sector, sectors):
    table, plain = ExtentTable(), Plain()
    for new in spliced:
        table.splice([new])
        plain.splice(new)
    after = list(table)
    assert all(one.sectors > 0 for one in after)
    assert all(one.end <= other.sector for one, other in pairwise(after))
    covered = Plain()
    for piece in table.covering(sector, sectors):
        assert sector <= piece.sector < piece.end
        assert piece.end <= sector + sectors
        covered.splice(piece)
    inside = range(sector, sector + sectors)
    assert covered.sectors == {at: one for at, one in plain.sectors.items() if at in inside}
    assert table.first_gap(sector, sectors) == plain.first_run(sector, sectors, lambda one: one is None)
    unwritable = plain.first_run(sector, sectors, lambda one: one is None or not one.writable)
    assert table.first_unwritable(sector, sectors) == unwritable


def test_extents_that_continue_each_other_grow_together():
    """A thin copy that is written from front to back stays a handful of extents."""
    table = ExtentTable([Extent(0, 1000, ZEROS)])
    for sector in range(0, 1000, 8):
        table.splice([extent(sector, 8, 3)])
    assert list(table) == [extent(0, 1000, 3)]


def test_neighbours_that_do_not_continue_each_other_stay_apart():
    """Another file, another place in the file, or other rights."""
    first = Extent(0, 8, 3, 0, writable=True)
    for second in (
        Extent(8, 8, 4, 8 * SECTOR_SIZE, writable=True),
        Extent(8, 8, 3, 9 * SECTOR_SIZE, writable=True),
        Extent(8, 8, 3, 8 * SECTOR_SIZE),
    ):
        assert list(ExtentTable([first, second])) == [first, second]


def test_zeros_grow_together():
    """They have no bytes anywhere, so each run of them continues the other."""
    assert list(ExtentTable([Extent(0, 8, ZEROS), Extent(8, 8, ZEROS)])) == [Extent(0, 16, ZEROS)]


def test_nothing_covers_an_empty_range():
    """Also where it lies inside an extent: fallocate, for one, takes no length of 0."""
    table = ExtentTable([extent(0, 8, 3)])
    assert table.covering(4, 0) == []
    assert table.first_gap(4, 0) is table.first_unwritable(4, 0) is None


def test_range_far_behind_the_table_is_a_gap():
    assert ExtentTable([extent(0, 8, 3)]).first_gap(2**64, 8) == Run(2**64, 8)
