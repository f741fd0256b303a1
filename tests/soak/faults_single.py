"""Faults of one member and of the wires to it, under load.

Concurrency: the conductor's thread; what may hang is done in a process or thread that can be left.
"""

import contextlib
import errno
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from tests.soak import layout
from tests.soak.arena import Arena, FaultError
from tests.soak.control import nap, until
from tests.soak.mounts import Mount
from tests.soak.proxy import Mode
from tests.soak.table import fault

KEEPALIVE_S: Final = 13.0
"""After so long gRPC's keepalive takes a silent peer for dead (measured: 12 s)."""

BACKOFF_S: Final = 5.0
"""The longest the mirror waits between two tries."""

WRITE_S: Final = 16.0
"""A write gives up within a small multiple of `--timeout` (5 s): it is sent, and read back."""

QUIET_S: Final = 8.0

GIVEN_UP: Final = frozenset((errno.ETIMEDOUT, errno.EIO))


def state_machine(mount: Mount) -> Any:
    return mount.statistics()["state_machine"]


def connected(mount: Mount) -> bool:
    return bool(mount.statistics()["mirror"]["connected"])


def check(condition: object, what: str) -> None:
    if not condition:
        raise FaultError(what)


def errno_of(action: Callable[[], object]) -> int:
    """Return the errno of what an action raises; 0 if it succeeds."""
    try:
        action()
    except OSError as exc:
        return exc.errno or -1
    return 0


def check_given_up(arena: Arena) -> None:
    """Check that a write fails in bounded time, with an error that says so."""
    began = time.monotonic()
    number = errno_of(lambda: (arena.author.path / "soak" / "given-up").write_bytes(b"x"))
    check(number in GIVEN_UP, f"a write while etcd is away: {os.strerror(number)}")
    check(time.monotonic() - began < WRITE_S, "a write did not give up in time")


def check_reads_go_on(arena: Arena) -> None:
    """Check that readers read, from the mirror."""
    load = arena.load
    if load is None:
        return
    before = load.done("reader")
    until(lambda: load.done("reader") > before + 20, "reads go on", 20)


def wire(arena: Arena) -> Any:
    assert arena.wire is not None
    return arena.wire


def author_wire(arena: Arena) -> Any:
    assert arena.author_wire is not None
    return arena.author_wire


# --- the member -----------------------------------------------------------------------------


@fault("1", "kill -9 of etcd, and restart", "single", 15)
def killed(arena: Arena) -> None:
    """The watch resumes after the last event it brought; nothing is listed again. Reads go on."""
    member = arena.etcds.members[0]
    before = state_machine(arena.reader)
    member.kill()
    until(lambda: not connected(arena.reader), "the end of the watch is noticed", KEEPALIVE_S)
    check_reads_go_on(arena)
    arena.etcds.restart(member)
    until(lambda: connected(arena.reader), "the watch stands again", 15)
    after = state_machine(arena.reader)
    check(after["lists"] == before["lists"], "it was listed again")
    check(after["resumes"] > before["resumes"], "it was not resumed")


@fault("2", "SIGSTOP of etcd, longer than keepalive", "single", KEEPALIVE_S + BACKOFF_S)
def stopped(arena: Arena) -> None:
    """It is noticed within 15 s; writes give up in time; reads go on from the mirror."""
    member = arena.etcds.members[0]
    member.signal(signal.SIGSTOP)
    try:
        check_given_up(arena)
        check_reads_go_on(arena)
        until(lambda: not connected(arena.reader), "a silent etcd is noticed", 20)
    finally:
        member.signal(signal.SIGCONT)


@fault("3", "half-open connection", "single", KEEPALIVE_S + BACKOFF_S)
def half_open(arena: Arena) -> None:
    """As with a stopped etcd: noticed by keepalive, within 15 s."""
    wire(arena).set(Mode.SWALLOW)
    try:
        check_reads_go_on(arena)
        until(lambda: not connected(arena.reader), "a half-open connection is noticed", 20)
    finally:
        wire(arena).set(Mode.PASS)


@fault("+", "defragmentation", "single", 10)
def defragmented(arena: Arena) -> None:
    """Etcd answers nobody for a while; nothing fails for good."""
    arena.etcds.raw(arena.etcds.members[0]).defragment()


@fault("20", "NOSPACE alarm, on and off", "single", 10)
def no_space(arena: Arena) -> None:
    """Writes are ENOSPC, reads go on, and writes do again once the alarm is disarmed."""
    client = arena.etcds.raw()
    member = client.status().header.member_id
    file = arena.author.path / "soak" / "full"
    client.set_no_space(member, on=True)
    try:
        number = errno_of(lambda: file.write_bytes(b"x"))
        check(number == errno.ENOSPC, f"not ENOSPC but {os.strerror(number)}")
        check_reads_go_on(arena)
    finally:
        client.set_no_space(member, on=False)
    file.write_bytes(b"there is room again")
    file.unlink()


@fault("+", "nothing at all", "single", 10)
def nothing(arena: Arena) -> None:
    """Everybody reads and writes for a while, and all is well."""
    nap(QUIET_S)


# --- the wires ------------------------------------------------------------------------------


@fault("6", "the answer to a write is lost", "single", 15)
def reply_lost(arena: Arena) -> None:
    """The write is not sent again: it is found by reading back, or reported. Never twice."""
    before = arena.author.statistics()["store"]["transactions"]
    for _ in range(6):
        author_wire(arena).set(Mode.NO_REPLIES)
        nap(0.2 + arena.chance.random() / 2)
        author_wire(arena).cut()
        author_wire(arena).set(Mode.PASS)
        load = arena.load
        if load is not None:
            turns = load.done("author")
            until(lambda: load.done("author") > turns + 3, "the author goes on", 60)  # noqa: B023
    check(arena.author.statistics()["store"]["transactions"] > before, "nothing was written")


@fault("7", "compaction while disconnected", "single", 15)
def compacted(arena: Arena) -> None:
    """It is listed again and the difference applied: changes, deletions and new keys are seen."""
    before = state_machine(arena.reader)
    wire(arena).set(Mode.REFUSE)
    try:
        if arena.load is not None:
            arena.load.until_busy(10)
        _compact(arena)
    finally:
        wire(arena).set(Mode.PASS)
    until(lambda: connected(arena.reader), "the watch stands again", 20)
    after = state_machine(arena.reader)
    check(after["lists"] > before["lists"], "it was not listed again")


@fault("8", "compaction at the revision of a deletion", "single", 15)
def compacted_tombstone(arena: Arena) -> None:
    """The deleted file disappears (etcd issues 18089 and 19179)."""
    name = layout.CHURNED[0]
    raw = arena.etcds.raw()
    raw.put((layout.key("gone"), b"x"))
    until((arena.reader.path / "soak" / "gone").exists, "it is there", 20)
    wire(arena).set(Mode.REFUSE)
    try:
        _compact(
            arena, lambda: raw.delete(layout.key("gone")), lambda: raw.delete(layout.key(name))
        )
    finally:
        wire(arena).set(Mode.PASS)
    until(lambda: not (arena.reader.path / "soak" / "gone").exists(), "it is gone", 20)


def _compact(arena: Arena, *last: Callable[[], int]) -> None:
    """Compact up to the newest revision, of which the recorder knows."""
    held = contextlib.nullcontext() if arena.load is None else arena.load.held()
    with held:
        for change in last:
            change()
        revision = arena.etcds.ask(lambda client: client.revision())
        if arena.load is not None:
            arena.load.until_recorded(mark=not last)
            revision = max(revision, arena.etcds.ask(lambda client: client.revision()))
        arena.etcds.raw().compact(revision)


@fault("17", "a backlog of 10 MB", "single", 20)
def backlog(arena: Arena) -> None:
    """It is applied revision by revision; no limit of a message's size stands in its way."""
    raw = arena.etcds.raw()
    wire(arena).set(Mode.REFUSE)
    try:
        for n in range(10):
            raw.put(*((layout.key(f"bulk/{n}.{m}"), b"%d" % n * 100_000) for m in range(10)))
    finally:
        wire(arena).set(Mode.PASS)
    arena.recovered(20)
    raw.delete(layout.key("bulk/"), layout.key("bulk0"))


@fault("+", "no more descriptors for the daemon", "single", 20)
def no_descriptors(arena: Arena) -> None:
    """It cannot connect again, and says so; when there are descriptors again, it goes on."""
    daemon = arena.reader.daemon
    usual = resource.prlimit(daemon, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon, resource.RLIMIT_NOFILE, (3, usual[1]))
    try:
        wire(arena).cut()
        check_reads_go_on(arena)
        nap(1)
    finally:
        resource.prlimit(daemon, resource.RLIMIT_NOFILE, usual)


# --- load -----------------------------------------------------------------------------------


@fault("27", "a storm of events", "single", 30)
def storm(arena: Arena) -> None:
    """Reads go on, nothing deadlocks, and the mount catches up."""
    raw = arena.etcds.raw()
    top = arena.reader.path / "soak" / "storm"
    names = [f"storm/{n}" for n in range(100)]
    raw.put(*((layout.key(name), b"0") for name in names))
    until(top.exists, "the first of it is there", 20)
    ending = threading.Event()

    def look() -> int:
        looks = 0
        while not ending.is_set():
            for entry in os.scandir(top):
                with open(entry.path, "rb") as file:
                    file.read()
                looks += 1
        return looks

    with ThreadPoolExecutor(4) as pool:
        looking = [pool.submit(look) for _ in range(4)]
        try:
            for n in range(200):
                raw.put(*((layout.key(name), b"%d" % n) for name in names))
        finally:
            ending.set()
        check(all(future.result(60) for future in looking), "nobody could look")
    arena.recovered(30)
    raw.delete(layout.key("storm/"), layout.key("storm0"))


@fault("28", "two hundred writers that are stuck", "single", KEEPALIVE_S + BACKOFF_S)
def stuck_writers(arena: Arena) -> None:
    """While they wait for an etcd that hangs, stats and listings are answered within 100 ms."""
    top = arena.author.path / "soak"
    member = arena.etcds.members[0]
    arrived = threading.Semaphore(0)

    def write(n: int) -> None:
        arrived.release()
        with contextlib.suppress(OSError):
            (top / "stuck" / f"{n}").write_bytes(b"x")

    (top / "stuck").mkdir()
    with ThreadPoolExecutor(200) as pool:
        member.signal(signal.SIGSTOP)
        try:
            writing = [pool.submit(write, n) for n in range(200)]
            for _ in range(200):
                check(arrived.acquire(timeout=30), "the writers do not start")
            times = sorted(_time_of_look(top) for _ in range(21))
        finally:
            member.signal(signal.SIGCONT)
        check(times[10] < 0.1, f"half of the looks took more than {times[10] * 1000:.0f} ms")
        for future in writing:
            future.result(60)
    arena.etcds.ask(lambda client: client.delete(layout.key("stuck/"), layout.key("stuck0")))


def _time_of_look(top: Any) -> float:
    began = time.monotonic()
    os.listdir(top / "t")
    os.stat(top / "t" / "0")
    return time.monotonic() - began
