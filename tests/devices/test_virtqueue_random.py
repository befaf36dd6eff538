"""Drivers at random: whatever is in the rings, `pop` returns a chain that is sound, or says what is wrong.

``KVMPY_CAMPAIGN=1`` tries ten thousand of each kind, otherwise a fiftieth runs.
"""

import os
import struct

from hypothesis import event, given, settings
from hypothesis import strategies as st
from packed_pair import Packed
from split_pair import DATA, EVENT_IDX, INDIRECT_DESC, RINGS, TABLE, Split

from kvmpy import MiB
from kvmpy.conformance.layout import AVAIL, INDIRECT, NEXT, USED, WRITE
from kvmpy.devices.virtqueue import CHAIN_BYTES_MAX, Chain
from kvmpy.errors import VirtqueueError

EXAMPLES = 10_000 if os.environ.get("KVMPY_CAMPAIGN") == "1" else 200
SIZE = 4
RAM = 1 * MiB
EDGES = [0, 1, RAM - 1, RAM - 512, RAM, 0xD000_0000, 2**32, 2**64 - 512, 2**64 - 1]


def mostly(usual, wild):
    """Draw from ``usual``, and once in a while from ``wild``."""
    return st.integers(0, 15).flatmap(lambda n: wild if n == 15 else st.sampled_from(usual))


gpas = mostly([DATA, DATA, DATA, TABLE, TABLE, TABLE, RINGS, 0, RAM - 512], st.sampled_from(EDGES))
lengths = mostly([0, 1, 16, 32, 48, 64, 512], st.sampled_from([80, RAM, 2**32 - 16, 2**32 - 1]))
flags = mostly([0, 0, WRITE, NEXT, NEXT, NEXT | WRITE, INDIRECT, INDIRECT | WRITE], st.integers(0, 2**16 - 1))
indices = mostly(range(SIZE), st.integers(0, 2**16 - 1))
descriptors = st.tuples(gpas, lengths, flags, indices)
tables = st.lists(descriptors, min_size=SIZE, max_size=SIZE)
features = st.sampled_from([0, INDIRECT_DESC, INDIRECT_DESC, INDIRECT_DESC | EVENT_IDX])


def check(pair, chain: Chain) -> None:
    """All that `Chain` promises."""
    buffers = chain.readable + chain.writable
    assert 0 < len(buffers) <= SIZE
    assert sum(size for _, size in buffers) <= CHAIN_BYTES_MAX
    assert all(gpa + size <= RAM for gpa, size in buffers if size)
    assert 0 <= chain.head < SIZE
    assert 1 <= chain.slots <= SIZE


def pop_all(pair) -> None:
    """Pop until the queue is empty or broken; check what comes, what was touched, and that nothing was written."""
    before = pair.memory.read(0, RAM)
    while True:
        pair.memory.touched.clear()
        result = None
        try:
            result = pair.device.pop()
        except VirtqueueError as error:
            event(error.fault.name)
        # The index and the head, or the flags; and each descriptor of at most a whole queue, and one that refers.
        assert len(pair.memory.touched) <= 2 + 2 * (SIZE + 1)
        assert all(gpa + size <= RAM for gpa, size in pair.memory.touched)
        if result is None:
            break
        event("chain")
        check(pair, result)
    assert pair.memory.read(0, RAM) == before


def put(memory, gpa: int, table) -> None:
    memory.write(gpa, b"".join(struct.pack("<QIHH", *descriptor) for descriptor in table))


@given(ring=tables, table=tables, heads=st.lists(indices, min_size=SIZE, max_size=SIZE), ahead=indices, bits=features)
@settings(max_examples=EXAMPLES, deadline=None)
def test_split_driver_at_random(ring, table, heads, ahead, bits):
    split = Split(size=SIZE, features=bits)
    put(split.memory, RINGS, ring)
    put(split.memory, TABLE, table)
    for slot, head in enumerate(heads):
        split.driver.set_avail(slot, head)
    split.driver.avail_idx = ahead
    pop_all(split)
    split.memory.close()


packed_flags = st.tuples(flags, st.sampled_from([AVAIL] * 7 + [USED, 0])).map(
    lambda drawn: drawn[0] & ~(AVAIL | USED) | drawn[1]
)
packed_tables = st.lists(st.tuples(gpas, lengths, indices, packed_flags), min_size=SIZE, max_size=SIZE)


@given(ring=packed_tables, table=packed_tables, bits=features)
@settings(max_examples=EXAMPLES, deadline=None)
def test_packed_driver_at_random(ring, table, bits):
    packed = Packed(size=SIZE, features=bits)
    put(packed.memory, RINGS, ring)
    put(packed.memory, TABLE, table)
    pop_all(packed)
    packed.memory.close()
