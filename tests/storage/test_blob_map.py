"""The map against a list with one entry a page; names; moments."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.storage import blob_time
from kvmpy.storage.blob_layer import Folder, Layer, is_layer_name
from kvmpy.storage.blob_map import PageMap

LAYERS = [Layer(Folder(-1, ""), name) for name in "abc"]
PAGES = 40

assignments = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES), st.sampled_from(LAYERS)), max_size=12
)


def mapped(changes):
    """Return a map after some assignments, and what it should say."""
    map_, expected = PageMap(PAGES, [0], [LAYERS[0]]), [LAYERS[0]] * PAGES
    for start, pages, layer in changes:
        end = min(start + pages, PAGES)
        map_.assign(start, end, layer)
        expected[start:end] = [layer] * (end - start)
    return map_, expected


def flat(map_, start=0, end=None):
    """Return the layer of each page."""
    return [
        run.layer for run in map_.runs(start, map_.pages if end is None else end) for _ in range(run.start, run.end)
    ]


@given(assignments)
def test_map_says_what_was_assigned(changes):
    map_, expected = mapped(changes)
    assert flat(map_) == expected


@given(assignments)
def test_neighbours_in_one_layer_are_one_run(changes):
    map_, expected = mapped(changes)
    assert len(map_) == 1 + sum(a is not b for a, b in itertools.pairwise(expected))


@given(assignments, st.integers(0, PAGES), st.integers(0, PAGES))
def test_runs_cover_what_was_asked_for_and_no_more(changes, start, end):
    map_, expected = mapped(changes)
    assert flat(map_, start, end) == expected[start:end]
    for run in map_.whole_runs(start, end):
        assert run.start < end
        assert run.end > start
        assert run in list(map_.runs(0, PAGES))


@given(assignments, st.integers(1, 2 * PAGES))
def test_resized_map_is_cut_off_or_in_the_given_layer(changes, pages):
    map_, expected = mapped(changes)
    assert flat(map_.resized(pages, LAYERS[1])) == (expected + [LAYERS[1]] * PAGES)[:pages]
    assert flat(map_) == expected


@given(assignments)
def test_ends_are_the_last_pages_of_each_layer(changes):
    map_, expected = mapped(changes)
    assert map_.ends() == {layer: at + 1 for at, layer in enumerate(expected)}


def test_copy_is_its_own():
    map_, expected = mapped([])
    map_.copy().assign(3, 5, LAYERS[2])
    assert flat(map_) == expected


# --- names and moments ---


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".layer",
        "0" * 31 + ".layer",
        "G" * 32 + ".layer",
        "../" + "0" * 29 + ".layer",
        "0" * 32,
        "0" * 32 + ".layer\n",
    ],
)
def test_name_that_we_do_not_give_is_none_of_a_layer(name):
    assert not is_layer_name(name)
    assert is_layer_name("0123456789abcdef" * 2 + ".layer")


@given(st.integers(0, blob_time.LAST))
def test_moments_and_etags_are_read_as_they_were_written(ticks):
    assert blob_time.parse_moment(blob_time.format_moment(ticks)) == ticks
    assert blob_time.parse_etag(blob_time.format_etag(ticks)) == ticks


def test_moment_looks_like_azures():
    assert blob_time.format_moment(639_286_295_761_234_567) == "2026-10-26T16:39:36.1234567Z"


@given(st.text('0123456789-:TZ.x"A', max_size=30))
def test_nothing_else_is_a_moment_or_an_etag(text):
    for parse in (blob_time.parse_moment, blob_time.parse_etag):
        with pytest.raises(ValueError):  # noqa: PT011
            parse(text)
