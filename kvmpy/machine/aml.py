"""ACPI Machine Language, as far as a DSDT of a few devices needs it: each function returns the bytes of one term.

    scope("\\\\_SB", device("COM1", name("_HID", eisa_id("PNP0501"))))

Of what a method may do there is only Notify. Not here: the tables around the code (`kvmpy.machine.acpi`).

Source: ACPI 6.5 §20.2 (AML grammar), §6.4 (resource data types). Floor: machine.
"""

import struct

# Opcodes (ACPI 6.5 §20.3)
ZERO, ONE = b"\x00", b"\x01"
NAME = b"\x08"
BYTE, WORD, DWORD, STRING, QWORD = b"\x0a", b"\x0b", b"\x0c", b"\x0d", b"\x0e"
SCOPE = b"\x10"
BUFFER = b"\x11"
PACKAGE = b"\x12"
METHOD = b"\x14"
NOTIFY = b"\x86"
DEVICE = b"\x5b\x82"
ROOT = b"\\"

MAX_PACKAGE_LENGTH = 1 << 28

# Extended interrupt descriptor, vector flags (ACPI 6.5 §6.4.3.6, table 6.56). Clear: active high, exclusive.
CONSUMER, EDGE_TRIGGERED = 1 << 0, 1 << 1


def package_length(size: int) -> bytes:
    """Return the PkgLength of ``size`` bytes that follow it; the number that it holds counts its own bytes too.

    One byte holds up to 63. Beyond, the first byte holds how many more follow (bits 7:6) and the low four bits of
    the number. Source: ACPI 6.5 §20.2.4.

    Raises:
        ValueError: ``size`` is negative, or the whole exceeds 2**28 - 1.
    """
    if not 0 <= size < MAX_PACKAGE_LENGTH - 4:
        raise ValueError(f"an AML package of {size} bytes: allowed is 0 to {MAX_PACKAGE_LENGTH - 5}")
    if size + 1 < 1 << 6:
        return bytes([size + 1])
    more = next(more for more in (1, 2, 3) if size + 1 + more < 1 << (4 + 8 * more))
    total = size + 1 + more
    return bytes([more << 6 | total & 0xF]) + (total >> 4).to_bytes(more, "little")


def _sized(opcode: bytes, content: bytes) -> bytes:
    return opcode + package_length(len(content)) + content


def name_string(path: str) -> bytes:
    r"""Return one name, four characters padded with ``_``, from the root where it begins with ``\``. Source: §20.2.2.

    Raises:
        ValueError: the name is longer than four characters or has others than A-Z, 0-9 and _.
    """
    segment = path.removeprefix("\\")
    plain = segment.isascii() and segment.replace("_", "A").isalnum() and segment == segment.upper()
    if not plain or len(segment) > 4 or segment[0].isdigit():
        raise ValueError(f"{path!r} is not an AML name (examples: COM1, \\_SB)")
    return (ROOT if path.startswith("\\") else b"") + segment.ljust(4, "_").encode()


def integer(value: int) -> bytes:
    """Return an integer of 0 to 2**64 - 1 in its shortest form. Source: ACPI 6.5 §20.2.3."""
    if value in (0, 1):
        return (ZERO, ONE)[value]
    for opcode, size in ((BYTE, 1), (WORD, 2), (DWORD, 4)):
        if value < 1 << 8 * size:
            return opcode + value.to_bytes(size, "little")
    return QWORD + value.to_bytes(8, "little")


def string(text: str) -> bytes:
    """Return a string of ASCII without NUL. Source: ACPI 6.5 §20.2.3."""
    return STRING + text.encode("ascii") + b"\0"


def name(path: str, value: bytes) -> bytes:
    """Return ``Name (path, value)``."""
    return NAME + name_string(path) + value


def package(*elements: bytes) -> bytes:
    """Return ``Package () {elements}``, at most 255 of them."""
    return _sized(PACKAGE, bytes([len(elements)]) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    """Return ``Buffer () {data}``."""
    return _sized(BUFFER, integer(len(data)) + data)


def scope(path: str, *terms: bytes) -> bytes:
    """Return ``Scope (path) {terms}``."""
    return _sized(SCOPE, name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Return ``Device (path) {terms}``."""
    return _sized(DEVICE, name_string(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes) -> bytes:
    """Return ``Method (path, arguments) {terms}``, with 0 to 7 arguments; not serialized. Source: §20.2.5.2."""
    return _sized(METHOD, name_string(path) + bytes([arguments]) + b"".join(terms))


def notify(path: str, value: int) -> bytes:
    """Return ``Notify (path, value)``: tell the drivers of a device. Source: ACPI 6.5 §20.2.5.3."""
    return NOTIFY + name_string(path) + integer(value)


def eisa_id(text: str) -> bytes:
    """Return ``EisaId (text)``: three letters of 5 bits and four hex digits, most significant byte first.

    Source: ACPI 6.5 §6.1.5 (_HID), §19.6 (EISAID).
    """
    first, second, third = (ord(letter) - ord("A") + 1 for letter in text[:3])
    number = first << 26 | second << 21 | third << 16 | int(text[3:], 16)
    return DWORD + number.to_bytes(4, "big")


def resource_template(*resources: bytes) -> bytes:
    """Return ``ResourceTemplate () {resources}``: a buffer with an end tag, whose checksum 0 is taken as right."""
    return buffer(b"".join(resources) + b"\x79\x00")


def io_ports(base: int, size: int) -> bytes:
    """Return the descriptor of ``size`` (up to 255) ports at ``base``, 16 bits decoded. Source: ACPI 6.5 §6.4.2.5."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, size)


def irq(number: int) -> bytes:
    """Return the descriptor of ISA IRQ ``number``, 0 to 15, edge triggered, active high. Source: ACPI 6.5 §6.4.2.1."""
    return struct.pack("<BH", 0x22, 1 << number)


def memory32_fixed(base: int, size: int) -> bytes:
    """Return the descriptor of ``size`` bytes of registers at ``base``, below 4 GiB. Source: ACPI 6.5 §6.4.3.4."""
    writable = 1
    return struct.pack("<BHBII", 0x86, 9, writable, base, size)


def interrupt(gsi: int) -> bytes:
    """Return the descriptor of one GSI, edge triggered, active high, not shared. Source: ACPI 6.5 §6.4.3.6."""
    return struct.pack("<BHBBI", 0x89, 6, CONSUMER | EDGE_TRIGGERED, 1, gsi)
