"""Ten thousand damaged page blobs: each opens, as it was or as it was meant, or is refused; nothing else happens.

``KVMPY_CAMPAIGN=1`` runs all of them, otherwise a fiftieth runs; ``KVMPY_SEED`` repeats a run.
"""

import os
import random
import shutil

import pytest
from blob_damage import journal_of, sealed, with_text
from blob_engine import pages

from kvmpy.errors import BlobError
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.blob_journal import RECORD_SIZE
from kvmpy.units import MiB

CAMPAIGN = 10_000
ROUNDS = CAMPAIGN if os.environ.get("KVMPY_CAMPAIGN") == "1" else CAMPAIGN // 50
NUMBERS = (0, 1, 511, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
VALUES = (None, True, -1, 0, 1, 2**63, 10**400, 1.5, "", "x", "../../etc/passwd", [], [[]] * 3, {}, float("nan"))


def flip(rng, data):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(rng, data):
    size = rng.choice((1, 2, 4, 8))
    at = rng.randrange(len(data)) // size * size
    value = (rng.choice(NUMBERS) + rng.choice((0, -1, 1))) % 2 ** (8 * size)
    data[at : at + size] = value.to_bytes(size, "little")


def cut(rng, data):
    del data[rng.randrange(len(data)) :]


def repeat(rng, data):
    start = rng.randrange(len(data))
    piece = data[start : start + rng.randint(1, 64)]
    at = rng.randrange(len(data))
    data[at:at] = piece


def change_value(rng, meta):
    """Set some value of the text to one that it should not have."""

    def change(fields):
        holder = rng.choice([fields, fields, *fields["snapshots"]])
        holder[rng.choice(list(holder))] = rng.choice(VALUES)

    return with_text(meta, change)


def mutated(rng, data: bytes, name: str) -> tuple[bytes, bool]:
    """Return the file damaged in some ways, and whether its CRC does not tell: somebody meant it."""
    if name == "meta" and rng.random() < 0.3:
        return change_value(rng, data), True
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if changed:
            rng.choice((flip, overwrite, cut, repeat))(rng, changed)
    if name == "meta" and rng.random() < 0.5:
        return sealed(bytes(changed[16:])), True
    return bytes(changed), False


def honest_states(original, folder):
    """Return what the blob says when a power cut takes some of its last records."""
    path = shutil.copytree(original, folder / "honest")
    states = []
    while os.path.getsize(journal_of(path)):
        states.append(state_of(path))
        os.truncate(journal_of(path), os.path.getsize(journal_of(path)) - RECORD_SIZE)
    return [*states, state_of(path)]


def state_of(path):
    """Return all that the blob has to say, or the refusal."""
    try:
        with PageBlob.open(path, readonly=True) as blob:
            return blob.content_length, blob.etag, blob.snapshots, blob.read(0, min(blob.content_length, 1 * MiB))
    except BlobError as error:
        return error


def write_to(path) -> None:
    try:
        with PageBlob.open(path) as blob:
            blob.write(0, pages("w"))
            blob.map(0, min(blob.content_length // 512, 4096), write=True)
    except BlobError:
        pass


@pytest.mark.timeout(1800)
def test_mutations_open_or_are_refused_with_an_offset(original, in_memory, capsys):
    """Case 68, ten thousand times: no other exception, no hang, nothing written outside the folder."""
    seed = int(os.environ.get("KVMPY_SEED") or random.SystemRandom().randrange(2**32))
    rng = random.Random(seed)
    honest = honest_states(original, in_memory)
    (in_memory / "outside").write_bytes(b"mine")
    around = sorted([*os.listdir(in_memory), "damaged"])
    opened = 0
    for round_ in range(ROUNDS):
        path = shutil.copytree(original, in_memory / "damaged", copy_function=os.link)
        file = rng.choice((path / "meta", journal_of(path)))
        data, meant = mutated(rng, file.read_bytes(), file.name)
        file.unlink()
        file.write_bytes(data)
        where = f"seed {seed}, round {round_}, {file.name}"
        try:
            state = state_of(path)
            write_to(path)
        except Exception as error:
            raise AssertionError(where) from error
        if isinstance(state, BlobError):
            assert state.offset is not None, where
            assert state.path.startswith(str(path)), where
        else:
            assert meant or state in honest, where
        opened += not isinstance(state, BlobError)
        assert sorted(os.listdir(in_memory)) == around, where
        shutil.rmtree(path)
    assert (in_memory / "outside").read_bytes() == b"mine"
    assert state_of(original)[3][:512] == pages("c")
    with capsys.disabled():
        print(f"\n{ROUNDS} damaged blobs, seed {seed}: {opened} opened, {ROUNDS - opened} refused")
    assert 0 < opened < ROUNDS
