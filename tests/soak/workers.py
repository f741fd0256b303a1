"""The processes that write, read, record and wait while a run's faults happen.

Run as `python -m tests.soak.workers TASK`, the task in JSON; each notes what it did in its
journal, and goes on whatever fails: what may fail is judged afterwards.

Roles:
    writer: Puts, deletes and bumps keys as a foreign client.
    author: Does the same through a mount.
    reader: Reads through the mount under test.
    listener: Watches the mount under test with inotify(7), and reads what it hears of.
    waiter: Asks the mount under test to show the newest revision, and tells all what it shows.
    recorder: Watches etcd at every member, and notes all events.

Concurrency: one thread per process; the recorder has one per member.
"""

import json
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

from tests.soak import layout
from tests.soak.control import Control, Flag, Mark, nap
from tests.soak.events import event_of, understand
from tests.soak.history import Kind, Outcome, Read, Write
from tests.soak.journal import Journal
from tests.soak.listening import Listener
from tests.soak.values import Label, decode, encode, encode_counter, encode_line

_WRITER_PACE_S: Final = 0.02
_AUTHOR_PACE_S: Final = 0.03
_READER_PACE_S: Final = 0.002
_WAITER_PACE_S: Final = 0.005
_AFTER_FAILURE_S: Final = 0.1
_CHUNK: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a worker is told."""

    role: str
    number: int
    pen: int
    seed: int
    control: str
    journal: str
    endpoints: tuple[str, ...] = ()
    mount: str = ""
    first: int = 0

    def encoded(self) -> str:
        return json.dumps(asdict(self))


def main(encoded: str) -> None:
    """Do one role until told to stop."""
    task = Task(**json.loads(encoded))
    control = Control(Path(task.control))
    roles: dict[str, Callable[[Task, Control, Journal], None]] = {
        "writer": write,
        "author": author,
        "reader": read,
        "listener": listen,
        "waiter": wait,
        "recorder": record,
    }
    with Journal(Path(task.journal)) as journal:
        roles[task.role](task, control, journal)


def _turns(task: Task, control: Control, hold: Flag, pace_s: float) -> Iterator[int]:
    """Yield the numbers of turns until the end of the run, and none while held."""
    for turn in range(1, sys.maxsize):
        while control.flag(hold) and not control.stopping:
            control.set_mark(task.number, Mark.HELD, 1)
            nap(0.005)
        control.set_mark(task.number, Mark.HELD, 0)
        if control.flag(hold):  # held again, just now
            continue
        if control.stopping:
            return
        yield turn
        control.set_mark(task.number, Mark.DONE, turn)
        nap(pace_s)


# --- foreign writers ------------------------------------------------------------------------


@final
class _Pen:
    """Names what a writer writes, and notes what became of it."""

    def __init__(self, task: Task, control: Control, journal: Journal) -> None:
        self._task = task
        self._control = control
        self._journal = journal
        self._counter = 0

    def label(self, total: int = 0) -> Label:
        """Return a label nobody had before."""
        self._counter += 1
        return Label(self._task.pen, self._counter, total)

    @contextmanager
    def noting(self, label: Label, *names: str) -> Iterator["_Result"]:
        """Note what the block tells of writing these names; unknown if it does not say."""
        result = _Result()
        sent = time.monotonic_ns()
        try:
            yield result
        finally:
            ended = time.monotonic_ns()
            if result.revision:
                self._control.set_mark(self._task.number, Mark.ACKNOWLEDGED, result.revision)
            failed = result.outcome is not Outcome.ACKNOWLEDGED
            if failed:
                marks = self._control.mark(self._task.number, Mark.FAILED)
                self._control.set_mark(self._task.number, Mark.FAILED, marks + 1)
            for name in names:
                index = layout.INDEX[name]
                self._journal.write(
                    Write(index, label.writer, label.counter, sent, ended, result.outcome)
                )


@dataclass(slots=True)
class _Result:
    outcome: Outcome = Outcome.UNKNOWN
    revision: int = 0

    def acknowledged(self, revision: int = 0) -> None:
        self.outcome = Outcome.ACKNOWLEDGED
        self.revision = revision


@final
class _Writer:
    """Writes as a foreign client."""

    def __init__(self, task: Task, control: Control, journal: Journal) -> None:
        from tests.soak.raw import Raw, RawError  # noqa: PLC0415 - readers need no gRPC

        self.error = RawError
        self._client = Raw(task.endpoints)
        self._number = task.number
        self._control = control
        self._chance = random.Random(task.seed)
        self._pen = _Pen(task, control, journal)

    def turn(self) -> None:
        match self._chance.randrange(10):
            case 0 | 1 | 2:
                self._put(layout.TOGETHER)
            case 3:
                self._put((self._chance.choice(layout.LASTING),))
            case 4 | 5:
                self._put((self._chance.choice(layout.SINGLE),))
            case 6:
                self._change(self._chance.choice(layout.COUNTERS), _bumped)
            case 7:
                self._change(layout.LOG, _lengthened)
            case 8:
                self._put((self._chance.choice(layout.CHURNED),))
            case _:
                revision = self._client.delete(layout.key(self._chance.choice(layout.CHURNED)))
                self._control.set_mark(self._number, Mark.ACKNOWLEDGED, revision)

    def _put(self, names: tuple[str, ...]) -> None:
        label = self._pen.label()
        pairs = [(layout.key(n), encode(n, label, _size(self._chance))) for n in names]
        with self._noting(label, *names) as result:
            result.acknowledged(self._client.put(*pairs))

    def _change(self, name: str, change: Callable[[_Pen, bytes], tuple[Label, bytes]]) -> None:
        """Read, change, and put if nobody else has put meanwhile."""
        found = self._client.get(layout.key(name))
        assert found is not None, f"{name} is not in etcd"
        label, new = change(self._pen, found.value)
        with self._noting(label, name) as result:
            revision = self._client.put_if(layout.key(name), new, found.mod_revision)
            if revision is None:
                result.outcome = Outcome.REFUSED
            else:
                result.acknowledged(revision)

    @contextmanager
    def _noting(self, label: Label, *names: str) -> Iterator["_Result"]:
        with self._pen.noting(label, *names) as result:
            try:
                yield result
            except self.error as exc:
                if exc.refused:
                    result.outcome = Outcome.REFUSED
                raise


def write(task: Task, control: Control, journal: Journal) -> None:
    """Write as a foreign client."""
    writer = _Writer(task, control, journal)
    for _ in _turns(task, control, Flag.HOLD_WRITERS, _WRITER_PACE_S):
        try:
            writer.turn()
        except writer.error:
            nap(_AFTER_FAILURE_S)


def _size(chance: random.Random) -> int:
    """Return a size that few other values have, so that stat(2) tells them apart."""
    return chance.choice(layout.SIZES) + chance.randrange(100)


def _bumped(pen: _Pen, old: bytes) -> tuple[Label, bytes]:
    name = old.split(b" ", 1)[0].decode()
    before = decode(name, old)
    assert before is not None, "a counter in etcd is torn"
    label = pen.label(before.total + 1)
    return label, encode_counter(name, label)


def _lengthened(pen: _Pen, old: bytes) -> tuple[Label, bytes]:
    label = pen.label()
    return label, old + encode_line(label)


# --- writers through a mount ----------------------------------------------------------------


@final
class _Author:
    """Writes through a mount, in every way that programs do."""

    def __init__(self, task: Task, control: Control, journal: Journal) -> None:
        self._chance = random.Random(task.seed)
        self._pen = _Pen(task, control, journal)
        self._top = Path(task.mount)
        self._draft = self._top / "m" / f"draft{task.number}"
        self._works = (
            *(self._replace, self._replace, self._rename_over, self._append, self._append),
            *(self._bump, self._fsync),
        )

    def turn(self) -> None:
        self._chance.choice(self._works)()

    def _replace(self) -> None:
        name, label = self._chance.choice(layout.MOUNTED), self._pen.label()
        with self._pen.noting(label, name) as result:
            (self._top / name).write_bytes(self._value(name, label))
            result.acknowledged()

    def _rename_over(self) -> None:
        name, label = self._chance.choice(layout.MOUNTED), self._pen.label()
        with self._pen.noting(label, name) as result:
            self._draft.write_bytes(self._value(name, label))
            self._draft.rename(self._top / name)
            result.acknowledged()

    def _append(self) -> None:
        label = self._pen.label()
        with self._pen.noting(label, layout.LOG) as result:
            fd = os.open(self._top / layout.LOG, os.O_WRONLY | os.O_APPEND)
            _write_and_close(fd, encode_line(label), None)
            result.acknowledged()

    def _bump(self) -> None:
        name = self._chance.choice(layout.COUNTERS)
        fd = os.open(self._top / name, os.O_RDWR)
        try:
            label, new = _bumped(self._pen, os.pread(fd, 1 << 16, 0))
        except BaseException:
            os.close(fd)
            raise
        with self._pen.noting(label, name) as result:
            # Not the first byte: replacing all would be a replacement, which the last one wins.
            try:
                _write_and_close(fd, new[1:], 1)
                result.acknowledged()
            except OSError as exc:
                if exc.errno == _ESTALE:
                    result.outcome = Outcome.REFUSED
                raise

    def _fsync(self) -> None:
        name, label = self._chance.choice(layout.MOUNTED), self._pen.label()
        with (
            (self._top / name).open("wb", buffering=0) as file,
            self._pen.noting(label, name) as result,
        ):
            file.write(self._value(name, label))
            os.fsync(file.fileno())
            result.acknowledged()

    def _value(self, name: str, label: Label) -> bytes:
        return encode(name, label, _size(self._chance))


def author(task: Task, control: Control, journal: Journal) -> None:
    """Write through a mount."""
    author = _Author(task, control, journal)
    for _ in _turns(task, control, Flag.HOLD_WRITERS, _AUTHOR_PACE_S):
        try:
            author.turn()
        except OSError as exc:
            if exc.errno != _ESTALE:
                nap(_AFTER_FAILURE_S)


_ESTALE: Final = 116


def _write_and_close(fd: int, data: bytes, offset: int | None) -> None:
    """Write; that is acknowledged by close(2), whose error must be seen."""
    try:
        if offset is None:
            os.write(fd, data)
        else:
            os.pwrite(fd, data, offset)
    except OSError:
        with suppress(OSError):
            os.close(fd)
        raise
    os.close(fd)


# --- readers --------------------------------------------------------------------------------


@final
class _Reader:
    """Looks at keys of the mount under test."""

    def __init__(self, task: Task, control: Control, journal: Journal) -> None:
        self._task = task
        self._control = control
        self._journal = journal
        self._chance = random.Random(task.seed)
        self._top = task.mount
        self._floor = 0
        self._ways = (_whole, _in_steps, _mapped, _after_stat)

    def turn(self) -> None:
        match self._chance.randrange(12):
            case 0 | 1 | 2 | 3:
                names = list(layout.TOGETHER)
                self._chance.shuffle(names)
                for name in names:
                    self._look(name)
            case 4:
                self._list()
            case 5:
                self._wait()
            case 6 | 7:
                for name in self._chance.sample(layout.NAMES, 8):
                    self._stat(name)
            case _:
                self._look(self._chance.choice(layout.NAMES))

    def _look(self, name: str) -> None:
        way = self._chance.choice(self._ways)
        floor = max(self._floor, self._control.flag(Flag.FLOOR))
        began = time.monotonic_ns()
        label = Label(0, 0)
        try:
            value = way(f"{self._top}/{name}")
            found = understand(name, value)
            kind = Kind.TORN if found is None else Kind.SEEN
            label = found or label
        except FileNotFoundError:
            kind = Kind.MISSING
        except OSError as exc:
            kind, label = Kind.ERROR, Label(0, exc.errno or 0)
        self._note(name, kind, label, began, floor)

    def _stat(self, name: str) -> None:
        """Look without a request, if the kernel knows."""
        floor = max(self._floor, self._control.flag(Flag.FLOOR))
        began = time.monotonic_ns()
        try:
            kind, found = Kind.SIZED, os.stat(f"{self._top}/{name}").st_size
        except FileNotFoundError:
            kind, found = Kind.MISSING, 0
        except OSError as exc:
            kind, found = Kind.ERROR, exc.errno or 0
        self._note(name, kind, Label(0, found), began, floor)

    def _list(self) -> None:
        floor = max(self._floor, self._control.flag(Flag.FLOOR))
        began = time.monotonic_ns()
        directory, _, _ = layout.CHURNED[0].rpartition("/")
        try:
            present = set(os.listdir(f"{self._top}/{directory}"))
        except FileNotFoundError:
            present = set()
        except OSError as exc:
            self._note(layout.CHURNED[0], Kind.ERROR, Label(0, exc.errno or 0), began, floor)
            return
        for name in layout.CHURNED:
            kind = Kind.PRESENT if name.rpartition("/")[2] in present else Kind.MISSING
            self._note(name, kind, Label(0, 0), began, floor)

    def _wait(self) -> None:
        """Wait for the newest revision myself: then nothing older may come."""
        revision = self._control.acknowledged()
        with suppress(OSError):
            os.getxattr(self._top, f"user.etcdfs.wait.{revision}")
            self._floor = max(self._floor, revision)

    def _note(self, name: str, kind: Kind, label: Label, began: int, floor: int) -> None:
        if kind is Kind.ERROR:
            failed = self._control.mark(self._task.number, Mark.FAILED)
            self._control.set_mark(self._task.number, Mark.FAILED, failed + 1)
        ended = time.monotonic_ns()
        self._journal.read(
            Read(
                self._task.number,
                layout.INDEX[name],
                kind,
                label.writer,
                label.counter,
                began,
                ended,
                floor,
            )
        )


def _whole(path: str) -> bytes | None:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _after_stat(path: str) -> bytes | None:
    os.stat(path)
    return _whole(path)


def _in_steps(path: str) -> bytes | None:
    """Read page by page; None if that is not as long as it was said to be."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        parts = []
        offset = 0
        while part := os.pread(fd, _CHUNK, offset):
            parts.append(part)
            offset += len(part)
    finally:
        os.close(fd)
    return b"".join(parts) if offset == size else None


def _mapped(path: str) -> bytes | None:
    with open(path, "rb", buffering=0) as file:
        if not os.fstat(file.fileno()).st_size:
            return b""
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return bytes(mapped)


def read(task: Task, control: Control, journal: Journal) -> None:
    """Read through the mount under test."""
    reader = _Reader(task, control, journal)
    for _ in _turns(task, control, Flag.HOLD_READERS, _READER_PACE_S):
        reader.turn()


def listen(task: Task, control: Control, journal: Journal) -> None:
    """Watch the mount under test."""
    listener = Listener(task.mount, task.number)
    try:
        while not control.stopping:
            for heard in listener.turn(control.flag(Flag.FLOOR)):
                journal.read(heard)
    finally:
        listener.close()


def wait(task: Task, control: Control, journal: Journal) -> None:
    """Tell all which revision the mount under test shows."""
    for _ in _turns(task, control, Flag.HOLD_READERS, _WAITER_PACE_S):
        revision = control.acknowledged()
        if revision <= control.flag(Flag.FLOOR):
            continue
        with suppress(OSError):
            os.getxattr(task.mount, f"user.etcdfs.wait.{revision}")
            control.set_flag(Flag.FLOOR, revision)


# --- the recorder ---------------------------------------------------------------------------


@final
class _Recorder:
    """Watches etcd at every member at once, and notes each event once."""

    def __init__(self, task: Task, control: Control, journal: Journal) -> None:
        from tests.soak.raw import Raw, RawError  # noqa: PLC0415 - readers need no gRPC

        self._open, self._error = Raw, RawError
        self._first = task.first
        self._control = control
        self._journal = journal
        self._lock = threading.Lock()
        self._noted: set[tuple[int, int]] = set()
        self._clients: dict[str, Any] = {}

    def follow(self, endpoint: str) -> None:
        """Watch at one member until the end of the run."""
        start = self._first + 1
        while not self._control.stopping:
            client = self._clients[endpoint] = self._open([endpoint])
            try:
                for response in client.watch(layout.PREFIX.encode(), start):
                    if response.compact_revision:
                        # What is gone was noted already: nobody compacts before that.
                        start = self._control.flag(Flag.RECORDED) + 1
                    if response.canceled:
                        break
                    start = max(start, self._note(response, time.monotonic_ns()) + 1)
            except self._error:
                pass
            client.close()
            nap(_AFTER_FAILURE_S)

    def close(self) -> None:
        """End all watches."""
        for client in [*self._clients.values()]:
            client.close()

    def _note(self, response: Any, seen: int) -> int:
        last = 0
        with self._lock:
            for told in response.events:
                last = told.kv.mod_revision
                event = event_of(told.kv, deleted=bool(told.type))
                if event is not None and (event.revision, event.key) not in self._noted:
                    self._noted.add((event.revision, event.key))
                    self._journal.event(event, seen)
            known = self._control.flag(Flag.RECORDED)
            self._control.set_flag(Flag.RECORDED, max(last, known))
        return last


def record(task: Task, control: Control, journal: Journal) -> None:
    """Note every event, whichever member tells it first."""
    recorder = _Recorder(task, control, journal)
    threads = [threading.Thread(target=recorder.follow, args=(e,)) for e in task.endpoints]
    for thread in threads:
        thread.start()
    while not control.stopping:
        nap(0.05)
    while any(thread.is_alive() for thread in threads):
        recorder.close()
        threads[0].join(0.1)


if __name__ == "__main__":
    main(sys.argv[1])
