"""C and its readable twin do the same: one stream of requests to both, and memory, rings and disk compared after each.

``KVMPY_CAMPAIGN=1`` runs a million chains, otherwise a fiftieth runs; ``KVMPY_SEED`` repeats a run.
"""

import os
import random

import pytest
from block_twins import FEATURES, Difference, Twins
from request_stream import REQUEST_TYPES

from kvmpy._shim import lib
from kvmpy.devices import block_request, virtqueue, virtqueue_packed
from kvmpy.devices.block_c import CBlock
from kvmpy.devices.block_execute import BlockExecutor
from kvmpy.devices.block_python import PythonBlock
from kvmpy.devices.virtqueue import Buffers, Fault, QueueFault, SplitQueue
from kvmpy.devices.virtqueue_packed import PackedQueue

CAMPAIGN = 1_000_000
CHAINS = CAMPAIGN if os.environ.get("KVMPY_CAMPAIGN") == "1" else CAMPAIGN // 50
CHAINS_TO_FIND_A_DEFECT = 12_000

STATUSES = (lib.VIRTIO_BLK_S_OK, lib.VIRTIO_BLK_S_IOERR, lib.VIRTIO_BLK_S_UNSUPP)


def coverage(twins):
    """Return how often each status, fault, request type and feature, on and off, was seen."""
    counts = {f"status {status}": twins.seen["status", status] for status in STATUSES}
    counts |= {fault.name: twins.seen["fault", fault] for fault in Fault}
    counts |= {f"type 0x{type:x}": twins.types[type] for type in REQUEST_TYPES}
    for name in FEATURES:
        short = name.removeprefix("VIRTIO_")
        counts |= {f"{short} on": twins.seen[name, True], f"{short} off": twins.seen[name, False]}
    return counts


@pytest.mark.timeout(3600)
def test_both_engines_leave_the_same_bytes(tmp_path, capsys):
    """Guest RAM, used ring, disk, fault, InterruptStatus and counters are the same after each batch, hostile or not.

    Buffers that overlap each other or the rings are compared too, under one order: data, status, used entry.
    """
    seed = int(os.environ.get("KVMPY_SEED") or random.SystemRandom().randrange(2**32))
    with capsys.disabled(), Twins(CBlock, PythonBlock, seed, tmp_path) as twins:
        print(f"\nseed {seed}: {CHAINS} chains", flush=True)
        twins.run(CHAINS)
        counts = coverage(twins)
        print("; ".join(f"{name}: {count}" for name, count in counts.items()))
    assert [name for name, count in counts.items() if not count] == []


# --- planted defects: each is one that somebody could have made --------------------------------------------------


def later_room(buffers):
    if len(buffers._readable) + len(buffers._writable) > buffers._queue_size:
        raise QueueFault(Fault.CHAIN_TOO_LONG)


def push_without_flag(ring, chain, written):
    push(ring, chain, written)
    slot = (ring._used.slot - chain.slots) % ring._setup.size
    flags = ring._descriptor(slot) + virtqueue_packed.FLAGS
    ring._put_u16(flags, ring._u16(flags) & ~lib.VRING_DESC_F_WRITE)


def always_interrupt(ring):
    ring._pushed = 0
    return True


def limits_without_readonly(block, features):
    return limits(block, features)._replace(readonly=False)


def entries_without_feature(memory, setup, *descriptor):
    return entries(memory, setup._replace(features=-1), *descriptor)


def write_before_asking(executor, sector, data):
    executor._move(os.pwritev, sector, data)
    write(executor, sector, data)


push, limits, entries, write = PackedQueue.push, PythonBlock.limits, virtqueue.indirect_entries, BlockExecutor._write

DEFECTS = {
    "flags are not checked": (virtqueue, "DESCRIPTOR_FLAGS", 0xFFFF),
    "chain may be one too long": (Buffers, "expect_room", later_room),
    "chain may have a byte too many": (virtqueue, "CHAIN_BYTES_MAX", 2**32 + 1),
    "indirect without the feature": (virtqueue, "indirect_entries", entries_without_feature),
    "used event is not looked at": (SplitQueue, "wants_interrupt", always_interrupt),
    "used flags lack WRITE": (PackedQueue, "push", push_without_flag),
    "unknown is an error": (block_request, "UNSUPP", block_request.IOERR),
    "a segment too many": (block_request, "RANGES_MAX", 17),
    "read-only is not checked": (PythonBlock, "limits", limits_without_readonly),
    "bytes move before the table covers them": (BlockExecutor, "_write", write_before_asking),
    "a failed sync is forgotten": (BlockExecutor, "_sync_failed", property(lambda _: False, lambda *_: None)),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defect_is_found(defect, tmp_path, monkeypatch):
    """The twin without one of its checks differs from C within a few thousand chains."""
    monkeypatch.setattr(*DEFECTS[defect], raising=False)  # what __init__ sets, too
    with Twins(CBlock, PythonBlock, 1, tmp_path) as twins, pytest.raises(Difference, match="seed 1, chain"):
        twins.run(CHAINS_TO_FIND_A_DEFECT)


def test_a_seed_repeats_its_stream(tmp_path):
    """What the seed of a failure is printed for."""
    seen = []
    for _ in range(2):
        with Twins(PythonBlock, PythonBlock, 7, tmp_path) as twins:
            twins.run(600)
            seen.append((twins.seen, twins.types, twins.sides[0].memory.read(0, 512 * 1024)))
    assert seen[0] == seen[1]
