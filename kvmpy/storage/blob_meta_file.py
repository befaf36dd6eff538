"""The file ``meta`` of a page blob: what the blob knew about itself when a generation began.

::

    0        magic "KVMPYBLB"
    8        version, u32
    12       CRC-32 of everything behind it, u32
    16       bytes of the text, u64
    24       bytes of the maps, u64
    32       text: JSON {"generation", "size", "content_format", "etag", ..., "layers": [names], "active": index,
             "runs": of the blob's map, "snapshots": [{"id", "size", "etag", "created", "runs"}, ...]}
    ...      maps: that of the blob, then those of the snapshots; each its runs' first pages (u64 each), then the
             indexes of their layers (u32 each)

Little-endian. The maps are not in the text because there may be a million runs of them; what a person would want to
read is. Nothing is believed: a sound CRC says that the file is as somebody wrote it, not who that was.

Not here: the journal, which says what happened since; whether the layers exist. Floor: storage.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import lt
from struct import Struct, pack, unpack_from
from typing import Any, NoReturn

from kvmpy.errors import BlobError
from kvmpy.storage.blob_layer import Layer, is_layer_name
from kvmpy.storage.blob_map import PageMap
from kvmpy.storage.blob_meta import (
    CONTENT_FORMATS,
    MAX_SEQUENCE_NUMBER,
    MAX_SIZE,
    PAGE_SIZE,
    Meta,
    SavedSnapshot,
    is_size,
)
from kvmpy.storage.blob_time import LAST, format_etag, format_moment, parse_etag, parse_moment
from kvmpy.units import MiB

META = "meta"

MAGIC = b"KVMPYBLB"
VERSION = 1
HEADER = Struct("<8sIIQQ")
_CRC_START = 16
MAX_TEXT = 4 * MiB
MAX_META = 128 * MiB

OpenLayer = Callable[[str], Layer]


# --- writing ------------------------------------------------------------------------------------------------------


def encode(meta: Meta, generation: int) -> bytes:
    """Return the file. Raises BlobError where it would be too large to be read again: too many snapshots."""
    layers = meta.layers()
    index = {layer: at for at, layer in enumerate(layers)}
    text = json.dumps(
        {
            "generation": generation,
            "size": meta.size,
            "content_format": meta.content_format,
            "etag": format_etag(meta.etag),
            "sequence_number": meta.sequence_number,
            "created": format_moment(meta.created),
            "last_modified": format_moment(meta.last_modified),
            "layers": [layer.name for layer in layers],
            "active": index[meta.active],
            "runs": len(meta.map),
            "snapshots": [
                {"id": format_moment(s.id), "size": s.size, "etag": format_etag(s.etag), "runs": len(s.map)}
                for s in meta.snapshots
            ],
        },
        indent=1,
    ).encode()
    maps = b"".join(_encode_map(map_, index) for map_ in (meta.map, *(s.map for s in meta.snapshots)))
    if len(text) > MAX_TEXT or HEADER.size + len(text) + len(maps) > MAX_META:
        raise BlobError("its metadata would be too large: delete snapshots first", path=META)
    body = pack("<QQ", len(text), len(maps)) + text + maps
    return MAGIC + pack("<II", VERSION, zlib.crc32(body)) + body


def _encode_map(map_: PageMap, index: dict[Layer, int]) -> bytes:
    starts = pack(f"<{len(map_)}Q", *map_.starts)
    return starts + pack(f"<{len(map_)}I", *map(index.__getitem__, map_.layers))


# --- reading ------------------------------------------------------------------------------------------------------


def decode(data: bytes, path: str, open_layer: OpenLayer) -> tuple[Meta, int]:
    """Return what the file says, and its generation; ``open_layer`` makes a Layer of a name that is one.

    Raises:
        BlobError: it is no metadata, or damaged; names the offset.
    """
    text_size = _check_header(data, path)
    fields = _Fields(data[HEADER.size : HEADER.size + text_size], path)
    names = fields.layer_names()
    layers = [open_layer(name) for name in names]
    maps = _Maps(data, HEADER.size + text_size, layers, path)
    size = fields.size(fields.all)
    active = layers[fields.integer(fields.all, "active", 0, len(layers) - 1)]
    meta = Meta(
        size=size,
        content_format=fields.content_format(),
        etag=fields.parsed(fields.all, "etag", parse_etag),
        sequence_number=fields.integer(fields.all, "sequence_number", 0, MAX_SEQUENCE_NUMBER),
        created=fields.parsed(fields.all, "created", parse_moment),
        last_modified=fields.parsed(fields.all, "last_modified", parse_moment),
        active=active,
        map=maps.take(fields.runs(fields.all), size),
        snapshots=tuple(_decode_snapshot(entry, fields, maps, active) for entry in fields.snapshots()),
    )
    maps.finish()
    if any(later.id <= earlier.id for earlier, later in pairwise(meta.snapshots)):
        fields.refuse("snapshots", "the snapshots do not ascend")
    return meta, fields.integer(fields.all, "generation", 1, 2**63 - 1)


def _check_header(data: bytes, path: str) -> int:
    """Return the size of the text. What is behind it are the maps."""
    if len(data) < HEADER.size:
        raise BlobError(f"truncated: {HEADER.size} bytes of a header are the least", path=path, offset=len(data))
    text_size: int
    magic, version, crc, text_size, maps_size = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise BlobError("is not the metadata of a page blob", path=path, offset=0)
    if version != VERSION:
        raise BlobError(f"version {version}: this kvmpy reads version {VERSION}", path=path, offset=8)
    if text_size > MAX_TEXT or HEADER.size + text_size + maps_size != len(data):
        message = f"{text_size} bytes of text and {maps_size} of maps in a file of {len(data)}"
        raise BlobError(message, path=path, offset=16)
    if crc != zlib.crc32(memoryview(data)[_CRC_START:]):
        raise BlobError("damaged: the CRC is another", path=path, offset=12)
    return text_size


def _decode_snapshot(entry: dict[str, Any], fields: "_Fields", maps: "_Maps", active: Layer) -> SavedSnapshot:
    size = fields.size(entry)
    snapshot = SavedSnapshot(
        id=fields.parsed(entry, "id", parse_moment),
        size=size,
        etag=fields.parsed(entry, "etag", parse_etag),
        map=maps.take(fields.runs(entry), size),
    )
    if active in snapshot.map.ends():
        fields.refuse("active", "a snapshot's pages are in the layer that is written")
    return snapshot


class _Fields:
    """The text of the file, its values checked one by one when they are asked for."""

    def __init__(self, text: bytes, path: str) -> None:
        self._text = text
        self._path = path
        try:
            self.all = json.loads(text.decode())
        except json.JSONDecodeError as error:
            offset = HEADER.size + len(error.doc[: error.pos].encode())
            raise BlobError(f"the text is no JSON: {error.msg}", path=path, offset=offset) from None
        except UnicodeDecodeError as error:
            raise BlobError("the text is no UTF-8", path=path, offset=HEADER.size + error.start) from None
        except (ValueError, RecursionError) as error:
            raise BlobError(f"the text is no JSON of ours: {error}", path=path, offset=HEADER.size) from None
        if type(self.all) is not dict:
            raise BlobError("the text is no JSON object", path=path, offset=HEADER.size)

    def refuse(self, key: str, message: str) -> NoReturn:
        """Raise BlobError with the offset of ``key``, or of the text where it is missing."""
        offset = HEADER.size + max(self._text.find(f'"{key}"'.encode()), 0)
        raise BlobError(message, path=self._path, offset=offset)

    def integer(self, fields: dict[str, Any], key: str, least: int, most: int) -> int:
        value = fields.get(key)
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, f"{key} is no number from {least} to {most}")
        return value

    def size(self, fields: dict[str, Any]) -> int:
        size = self.integer(fields, "size", PAGE_SIZE, MAX_SIZE)
        if not is_size(size):
            self.refuse("size", f"{size} bytes are no whole number of pages")
        return size

    def runs(self, fields: dict[str, Any]) -> int:
        return self.integer(fields, "runs", 1, MAX_META // 12)

    def parsed(self, fields: dict[str, Any], key: str, parse: Callable[[str], int]) -> int:
        value = fields.get(key)
        try:
            ticks = parse(value if type(value) is str else "")
        except (ValueError, OverflowError):
            ticks = -1
        if not 0 <= ticks <= LAST:
            self.refuse(key, f"{key} is malformed")
        return ticks

    def content_format(self) -> str:
        value = self.all.get("content_format")
        if value not in CONTENT_FORMATS:
            self.refuse("content_format", f"content_format is none of {', '.join(CONTENT_FORMATS)}")
        return str(value)

    def layer_names(self) -> list[str]:
        names = self.all.get("layers")
        if type(names) is not list or not names or not all(type(name) is str and is_layer_name(name) for name in names):
            self.refuse("layers", "layers is no list of names of layers")
        if len(set(names)) != len(names):
            self.refuse("layers", "a layer is named twice")
        return names

    def snapshots(self) -> list[dict[str, Any]]:
        entries = self.all.get("snapshots")
        if type(entries) is not list or not all(type(entry) is dict for entry in entries):
            self.refuse("snapshots", "snapshots is no list of objects")
        return entries


class _Maps:
    """The maps at the end of the file, taken one after another."""

    def __init__(self, data: bytes, offset: int, layers: Sequence[Layer], path: str) -> None:
        self._data = data
        self._offset = offset
        self._layers = layers
        self._path = path

    def take(self, runs: int, size: int) -> PageMap:
        """Return the next map, of ``runs`` runs, which covers each page of ``size`` bytes once."""
        begin = self._offset
        self._offset += 12 * runs
        if self._offset > len(self._data):
            raise BlobError(f"a map of {runs} runs does not fit here", path=self._path, offset=begin)
        starts = unpack_from(f"<{runs}Q", self._data, begin)
        indexes = unpack_from(f"<{runs}I", self._data, begin + 8 * runs)
        self._check_starts(starts, size // PAGE_SIZE, begin)
        if max(indexes) >= len(self._layers):
            wrong = next(at for at, index in enumerate(indexes) if index >= len(self._layers))
            self._refuse(f"there is no layer {indexes[wrong]}", begin + 8 * runs + 4 * wrong)
        return PageMap(size // PAGE_SIZE, starts, list(map(self._layers.__getitem__, indexes)))

    def _check_starts(self, starts: Sequence[int], pages: int, begin: int) -> None:
        if starts[0] != 0:
            self._refuse("a map does not begin with page 0", begin)
        if not all(map(lt, starts, starts[1:])):
            wrong = next(at for at, (a, b) in enumerate(pairwise(starts), 1) if a >= b)
            self._refuse(f"run {wrong} of a map does not begin behind the one before it", begin + 8 * wrong)
        if starts[-1] >= pages:
            self._refuse(f"a run begins with page {starts[-1]} of {pages}", begin + 8 * len(starts) - 8)

    def finish(self) -> None:
        """Refuse what is behind the last map."""
        if self._offset != len(self._data):
            self._refuse("bytes behind the last map", self._offset)

    def _refuse(self, message: str, offset: int) -> NoReturn:
        raise BlobError(message, path=self._path, offset=offset)
