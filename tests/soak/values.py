"""Values that say who wrote them, and whether they are whole.

Knows: how a value carries its key, writer, counter, length and checksum, and what a log that is
appended to looks like. Does not know: who writes and reads.

Concurrency: pure functions.
"""

import zlib
from typing import Final, NamedTuple

COUNTER_SIZE: Final = 128
"""Size of the values of counters: always the same, so that part of one can be overwritten."""


class Label(NamedTuple):
    """Who wrote a value, as its how-manieth; `total` is where a counter has got to."""

    writer: int
    counter: int
    total: int = 0


def encode(key: str, label: Label, size: int) -> bytes:
    """Return a value of about `size` bytes, no smaller than what it has to say."""
    stamp = b"%d.%d " % (label.writer, label.counter)
    body = (stamp * (size // len(stamp) + 1))[:size]
    head = b"%s %d %d %d %05d" % (key.encode(), *label, size)
    return b"%s %08x\n%s" % (head, zlib.crc32(body, zlib.crc32(head)), body)


def encode_counter(key: str, label: Label) -> bytes:
    """Return a counter's value, `COUNTER_SIZE` bytes long."""
    size = COUNTER_SIZE
    while len(value := encode(key, label, size)) > COUNTER_SIZE:
        size -= len(value) - COUNTER_SIZE
    return value


def decode(key: str, value: bytes) -> Label | None:
    """Return the label of a value; None if it is not the whole of one value of this key."""
    first, newline, body = value.partition(b"\n")
    head, _, checksum = first.rpartition(b" ")
    try:
        name, *numbers = head.split(b" ")
        writer, counter, total, size = map(int, numbers)
        expected = int(checksum, 16)
    except ValueError:
        return None
    whole = bool(newline) and len(body) == size and name == key.encode()
    if not whole or zlib.crc32(body, zlib.crc32(head)) != expected:
        return None
    return Label(writer, counter, total)


# --- logs -----------------------------------------------------------------------------------


def encode_line(label: Label) -> bytes:
    """Return one line of a log."""
    head = b"%d %d" % (label.writer, label.counter)
    return b"%s %08x\n" % (head, zlib.crc32(head))


def decode_lines(value: bytes) -> list[Label] | None:
    """Return the labels of a log's lines; None if any is not whole."""
    labels: list[Label] = []
    for line in value.splitlines(keepends=True):
        head, _, checksum = line.rpartition(b" ")
        try:
            writer, counter = map(int, head.split(b" "))
            whole = line.endswith(b"\n") and int(checksum, 16) == zlib.crc32(head)
        except ValueError:
            return None
        if not whole:
            return None
        labels.append(Label(writer, counter, len(labels) + 1))
    return labels
