"""``--disk``: what each key makes of a `Disk`, commas in names, and mistakes."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.cli.disk_option import KEYS, parse_disk
from kvmpy.pc.disk import Cache, Disk, Engine
from kvmpy.units import MiB


def test_a_path_alone_is_a_disk_with_every_default() -> None:
    assert vars(parse_disk("data.blob")) == vars(Disk("data.blob"))


def test_every_key_reaches_the_disk() -> None:
    text = "d,format=raw,readonly,cache=direct,queues=2,iops=500,bps=50M,serial=KV 01,engine=python"
    wanted = Disk(
        "d",
        format="raw",
        readonly=True,
        cache=Cache.DIRECT,
        queues=2,
        iops=500,
        bps=50 * MiB,
        serial="KV 01",
        engine=Engine.PYTHON,
    )
    assert vars(parse_disk(text)) == vars(wanted)
    assert {option.partition("=")[0] for option in text.split(",")[1:]} == set(KEYS)
    assert set(KEYS) == set(vars(wanted)) - {"path"}


@pytest.mark.parametrize(
    ("text", "path", "readonly"),
    [
        ("a,,b", "a,b", False),
        ("a,,b,readonly", "a,b", True),
        ("a,,,readonly", "a,", True),
        (",,,readonly", ",", True),
        ("a,,readonly", "a,readonly", False),
        (",,,,", ",,", False),
        ("a=b", "a=b", False),
    ],
)
def test_two_commas_are_one_in_a_name(text: str, path: str, readonly: bool) -> None:
    disk = parse_disk(text)
    assert (disk.path, disk.readonly) == (path, readonly)


@given(st.text(st.characters(exclude_characters="\0"), min_size=1))
def test_any_name_can_be_said(path: str) -> None:
    assert parse_disk(path.replace(",", ",,") + ",readonly").path == path


@given(st.text(st.sampled_from("ab,=") | st.characters(exclude_characters="\0")))
def test_any_text_is_a_disk_or_one_line(text: str) -> None:
    """Nothing but ValueError ever comes of a mistake."""
    with suppress(ValueError):
        assert parse_disk(text).path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not PATH"),
        (",readonly", "not PATH"),
        ("d,", "'' is no key of a disk"),
        ("d,colour=red", "'colour' is no key of a disk: format, readonly"),
        ("d,Readonly", "'Readonly' is no key"),
        ("d,readonly,readonly", "readonly is given twice"),
        ("d,iops=1,iops=1", "iops is given twice"),
        ("d,readonly=yes", "readonly takes no value"),
        ("d,readonly=", "readonly takes no value"),
        ("d,format", "format needs a value"),
        ("d,format=qcow2", "format=qcow2 is not one of blob, raw, vhd, vhd-fixed, vhd-dynamic"),
        ("d,serial=", "serial needs a value"),
        ("d,cache=none", "cache=none is not one of writeback, writethrough, direct"),
        ("d,engine=rust", "engine=rust is not one of c, python"),
        ("d,queues=two", "queues=two is not a whole number"),
        ("d,queues=-1", "queues=-1 is not a whole number"),
        ("d,queues=\u0662", "is not a whole number"),
        ("d,queues=0", "0 queues: allowed is 1 to 64"),
        ("d,queues=65", "65 queues: allowed is 1 to 64"),
        ("d,iops=1099511627777", "iops of 1099511627777: allowed is 1 to 1099511627776"),
        ("d,bps=fast", "'fast' is not a size"),
        ("d,bps=2T", "bps of 2199023255552: allowed is 1 to"),
        ("d,serial=" + "x" * 21, "up to 20 printable characters of ASCII"),
        ("d,serial=\u00e9", "up to 20 printable characters of ASCII"),
        ("d,serial=a\tb", "up to 20 printable characters of ASCII"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_disk(text)


def test_rates_of_nothing_are_no_limit() -> None:
    disk = parse_disk("d,iops=0,bps=0")
    assert (disk.iops, disk.bps) == (0, 0)
