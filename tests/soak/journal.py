"""What the processes of a run write down, and how it is read again.

Concurrency: one writer per file; read when it has ended.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self, final

from tests.soak.history import Event, Kind, Outcome, Read, Write

_READ: Final = struct.Struct("<bhhqqqqq")
_WRITE: Final = struct.Struct("<hhqqqb")
_EVENT: Final = struct.Struct("<qhhqqqq")


class Sighting(NamedTuple):
    """An event, and when the recorder was told."""

    event: Event
    seen: int


@final
class Journal:
    """A file of records, appended to; flushed when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, read: Read) -> None:
        kind = int(read.kind)
        rest = (read.writer, read.counter, read.began, read.ended, read.floor)
        self._file.write(_READ.pack(kind, read.reader, read.key, *rest))

    def write(self, write: Write) -> None:
        self._file.write(_WRITE.pack(*write[:5], int(write.outcome)))

    def event(self, event: Event, seen: int) -> None:
        self._file.write(_EVENT.pack(*event, seen))


def reads(path: Path) -> Iterator[Read]:
    for kind, reader, key, *rest in _READ.iter_unpack(path.read_bytes()):
        yield Read(reader, key, Kind(kind), *rest)


def writes(path: Path) -> Iterator[Write]:
    for key, writer, counter, sent, ended, outcome in _WRITE.iter_unpack(path.read_bytes()):
        yield Write(key, writer, counter, sent, ended, Outcome(outcome))


def sightings(path: Path) -> Iterator[Sighting]:
    for *event, seen in _EVENT.iter_unpack(path.read_bytes()):
        yield Sighting(Event(*event), seen)
