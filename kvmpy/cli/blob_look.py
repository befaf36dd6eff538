"""What ``kvmpy blob`` tells of disks: info, ranges, check.

Each function takes the command's arguments and returns the exit status and what is to be printed.
"""

import json
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvmpy.cli.messages import one_line
from kvmpy.storage import convert
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.blob_ranges import PageRange
from kvmpy.storage.lease import lease_state
from kvmpy.units import format_size

CLEAN = "clean"

Answer = tuple[int, str]


def info(arguments: Namespace) -> Answer:
    """Tell what a disk is."""
    found = {"path": arguments.path} | convert.disk_info(arguments.path, format=arguments.format)
    if found["format"] == "blob":
        found["lease"] = lease_state(arguments.path)._asdict()
    return 0, json.dumps(found, indent=2) if arguments.json else info_text(found)


def info_text(found: Mapping[str, Any]) -> str:
    """Return aligned lines of ``key: value``, and a table of the snapshots."""
    rows = [(key.replace("_", " "), VALUES.get(key, str)(value)) for key, value in found.items()]
    wide = max(len(key) for key, _ in rows) + 1
    lines = [f"{key + ':':{wide}}  {one_line(value)}" for key, value in rows]
    snapshots = [(snapshot["id"], size_text(snapshot["size"]), "") for snapshot in found.get("snapshots", ())]
    return "\n".join(lines) + ("\n\n" + table([("snapshot", "size", ""), *snapshots]) if snapshots else "")


def size_text(size: int) -> str:
    """Return a size for people, and exactly."""
    return f"{format_size(size)} ({size} bytes)" if format_size(size) != f"{size} bytes" else f"{size} bytes"


def lease_text(state: Mapping[str, Any]) -> str:
    """Return who holds a lease, in Azure's words for whether somebody does."""
    if not state["leased"]:
        return "available"
    host = f" on {state['host']}" if state["host"] else ""
    since = f" since {state['since']}" if state["since"] else ""
    who = f"process {state['pid']}" if state["pid"] else "another process"
    return f"leased by {who}{host}{since}"


def _geometry_text(geometry: Mapping[str, int]) -> str:
    return f"{geometry['cylinders']} cylinders, {geometry['heads']} heads, {geometry['sectors_per_track']} sectors"


VALUES: dict[str, Callable[[Any], str]] = {
    "size": size_text,
    "allocated": size_text,
    "block_size": size_text,
    "geometry": _geometry_text,
    "lease": lease_text,
    "snapshots": lambda snapshots: str(len(snapshots)),
}
"""How the values that are not just words and numbers are shown to people."""


def ranges(arguments: Namespace) -> Answer:
    """List the pages of a blob that hold something, or that differ from a snapshot's."""
    with PageBlob.open(arguments.path, readonly=True) as blob:
        found = blob.page_ranges() if arguments.since is None else blob.page_ranges_since(arguments.since)
    if arguments.json:
        fields = {"path": arguments.path, "since": arguments.since, "ranges": [run._asdict() for run in found]}
        return 0, json.dumps(fields, indent=2)
    if not found:
        return 0, "all zeros" if arguments.since is None else "nothing has changed"
    return 0, ranges_table(found)


def ranges_table(found: Sequence[PageRange]) -> str:
    """Return a line for each range, and one for all of them."""
    digits = len(f"{found[-1].offset:x}")
    rows = [(f"0x{run.offset:0{digits}x}", size_text(run.size), "cleared" if run.cleared else "") for run in found]
    total = ("total", size_text(sum(run.size for run in found)), "")
    return table([("offset", "size", ""), *rows, total])


def table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Return ``rows`` as lines in which the columns are aligned."""
    wide = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{row[0]:{wide[0]}}  {row[1]:{wide[1]}}  {row[2]}".rstrip() for row in rows)


def check(arguments: Namespace) -> Answer:
    """Look for damage."""
    os.stat(arguments.path)  # what is not there is an error, no damage
    problems = convert.check_disk(arguments.path, format=arguments.format)
    if not problems:
        return 0, CLEAN
    from kvmpy.pc.result import ExitStatus

    return ExitStatus.IMAGE, "\n".join(map(one_line, problems))
