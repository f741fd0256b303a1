"""Faults that are somebody else's doing on the same files, and ends of the daemon, under load.

Concurrency: the conductor's thread, and processes and threads that end with each fault.
"""

import contextlib
import errno
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from etcdfs.keyspace.keys import Keyspace
from tests.soak import layout
from tests.soak.arena import Arena, FaultError
from tests.soak.control import nap
from tests.soak.faults_single import check, errno_of
from tests.soak.mounts import ROOT
from tests.soak.table import fault

APPENDS = 300
KILLS = 3
MANY = 100_000
PAGE = 100


def put_and_show(arena: Arena, name: str, value: bytes) -> Path:
    """Put a key as a foreign client; return its path once the mount under test shows it."""
    arena.reader.wait(arena.etcds.raw().put((layout.key(name), value)))
    return arena.reader.path / "soak" / name


@contextlib.contextmanager
def child(program: str, *arguments: str | Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a Python program that touches a mount; it is ended when the body is left."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


@fault("18", "100 000 keys are listed while writers run", "single", 60)
def many_keys(arena: Arena) -> None:
    """The listing is of one revision, the watch goes on from it: the new mount equals etcd."""
    raw = arena.etcds.raw()
    for n in range(0, MANY, PAGE):
        raw.put(*((b"/many/%d/%d" % (n // 1000, m), b"%d" % m) for m in range(n, n + PAGE)))
    late = arena.mount("late", arena.etcds.url)
    try:
        held = contextlib.nullcontext() if arena.load is None else arena.load.held()
        with held:
            late.wait(arena.etcds.ask(lambda client: client.revision()))
            found = {
                f"{directory}/{name}"
                for directory in os.listdir(late.path / "many")
                for name in os.listdir(late.path / "many" / directory)
            }
            check(found == {f"{m // 1000}/{m}" for m in range(MANY)}, "not the keys that there are")
            for m in arena.chance.sample(range(MANY), 500):
                value = (late.path / "many" / f"{m // 1000}" / f"{m}").read_bytes()
                check(value == b"%d" % m, f"{m} is {value!r}")
    finally:
        late.close()
    for n in range(MANY // 1000):
        raw.delete(b"/many/%d/" % n, b"/many/%d0" % n)


@fault("19", "a value larger than etcd takes", "single", 10)
def too_large(arena: Arena) -> None:
    """EFBIG; the old value stays."""
    file = arena.author.path / "soak" / "large"
    file.write_bytes(b"old")
    number = errno_of(lambda: file.write_bytes(bytes(2 << 20)))
    check(number == errno.EFBIG, f"not EFBIG but {os.strerror(number)}")
    found = arena.etcds.raw().get(layout.key("large"))
    check(found is not None and found.value == b"old", "the old value is not there")
    check(file.read_bytes() == b"old", "the mount does not show the old value")
    file.unlink()


@fault("21", "renaming a directory of more keys than a transaction takes", "single", 10)
def large_rename(arena: Arena) -> None:
    """All of it or nothing, and if nothing, an errno that says so."""
    raw = arena.etcds.raw()
    for n in range(3):
        raw.put(*((layout.key(f"from/{n}.{m}"), b"x") for m in range(60)))
    arena.author.wait(raw.revision())
    top = arena.author.path / "soak"
    number = errno_of(lambda: (top / "from").rename(top / "to"))
    left = len(raw.below(layout.key("from/")))
    moved = len([key for key in raw.below(layout.key("to/")) if not key.endswith(b"/")])
    if number:
        refusals = (errno.EXDEV, errno.E2BIG, errno.EFBIG)
        check(number in refusals, f"an unclear refusal: {os.strerror(number)}")
    check((left, moved) == ((180, 0) if number else (0, 180)), f"half: {left} left, {moved} moved")
    for name in ("from", "to"):
        raw.delete(layout.key(f"{name}/"), layout.key(f"{name}0"))


@fault("22", "keys that no file can be called", "single", 10)
def odd_keys(arena: Arena) -> None:
    """Each has exactly one path, by a rule that can be reversed; the mount lives."""
    keys = [
        *(
            b"a//b",
            b"/",
            b"a/./b",
            b"a/../b",
            b"a/\0b",
            b"a/\xff\xfe",
            b"x" * 300,
            b"%=25",
            b"both",
        ),
        *(b"both/below", b"//", b"a/", b"\xc3\x28", b"tab\there", b"%value", b"%marker"),
    ]
    raw = arena.etcds.raw()
    space = Keyspace(b"/")
    paths = {}
    for n, key in enumerate(keys):
        raw.put((b"/odd/" + key, b"%d" % n))
        names = space.locate(b"/odd/" + key).names
        paths[key] = Path(os.fsdecode(b"/".join((os.fsencode(arena.reader.path), *names))))
    arena.reader.wait(raw.revision())
    for n, key in enumerate(keys):
        path = paths[key]
        if path.is_dir():
            path /= "%marker" if key.endswith(b"/") else "%value"
        check(path.read_bytes() == b"%d" % n, f"{key!r} is not what is at {path}")
    raw.delete(b"/odd/", b"/odd0")


_APPENDER = """
import os, sys
path, writer, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
from tests.soak.values import Label, encode_line
for n in range(count):
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(fd, encode_line(Label(writer, n)))
    os.close(fd)
"""


@fault("23", "two mounts append to one file", "single", 10)
def two_append(arena: Arena) -> None:
    """Every line is there, once, and whole."""
    from tests.soak.values import decode_lines  # noqa: PLC0415

    other = arena.mount("other", arena.etcds.url)
    try:
        revision = arena.etcds.raw().put((layout.key("two"), b""))
        for mount in (other, arena.author):
            mount.wait(revision)
        paths = [mount.path / "soak" / "two" for mount in (other, arena.author)]
        with (
            child(_APPENDER, paths[0], "1", f"{APPENDS}") as one,
            child(_APPENDER, paths[1], "2", f"{APPENDS}") as two,
        ):
            check(two.wait(120) == one.wait(120) == 0, "appending failed")
    finally:
        other.close()
    found = arena.etcds.raw().get(layout.key("two"))
    lines = decode_lines(found.value if found else b"torn")
    check(lines is not None, "a line is torn")
    wanted = {(writer, n) for writer in (1, 2) for n in range(APPENDS)}
    have = [(label.writer, label.counter) for label in lines or ()]
    check(len(have) == len(wanted) and set(have) == wanted, "lines are lost or doubled")
    arena.etcds.raw().delete(layout.key("two"))


@fault("24", "two mounts overwrite parts of one file", "single", 10)
def two_overwrite(arena: Arena) -> None:
    """One succeeds after the other, or fails with ESTALE: never a mixture that no order gives."""
    other = arena.mount("second", arena.etcds.url)
    try:
        for n in range(20):
            old = b"-" * 10_000
            revision = arena.etcds.raw().put((layout.key("parts"), old))
            fds = []
            for mount in (other, arena.author):
                mount.wait(revision)
                fds.append(os.open(mount.path / "soak" / "parts", os.O_RDWR))
            for fd, letter, offset in zip(fds, (b"a", b"b"), (100, 5000), strict=True):
                os.pwrite(fd, letter * 200, offset)
            numbers = [errno_of(lambda fd=fd: os.close(fd)) for fd in fds]  # type: ignore[misc]
            check(numbers == [0, errno.ESTALE], f"closing gave {numbers}")
            found = arena.etcds.raw().get(layout.key("parts"))
            wanted = old[:100] + b"a" * 200 + old[300:]
            check(found is not None and found.value == wanted, f"round {n}: a mixture")
    finally:
        other.close()
    arena.etcds.raw().delete(layout.key("parts"))


@fault("25", "a file is deleted that is open, mapped, or the working directory", "single", 10)
def deleted_in_use(arena: Arena) -> None:
    """What is open is read to its end; the path is ENOENT; nothing comes back by a late write."""
    raw = arena.etcds.raw()
    value = b"0123456789" * 1000
    file = put_and_show(arena, "use/file", value)
    fd = os.open(file, os.O_RDWR)
    inside = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    try:
        arena.reader.wait(raw.delete(layout.key("use/file")))
        check(errno_of(file.stat) == errno.ENOENT, "the path is still there")
        check(os.pread(fd, len(value) + 1, 0) == value, "what is open cannot be read")
        check(mapped[:] == value, "what is mapped cannot be read")
        check(os.fstat(fd).st_nlink == 0, "a deleted file has links")
        check(os.listdir(inside) == [], "the directory still lists it")
        os.pwrite(fd, b"late", 0)
        os.fsync(fd)
        check(raw.get(layout.key("use/file")) is None, "a late write brought it back")
    finally:
        mapped.close()
        for opened in (fd, inside):
            with contextlib.suppress(OSError):
                os.close(opened)


@fault("26", "a file is replaced by renaming, again and again", "single", 10)
def replaced(arena: Arena) -> None:
    """Whoever opens it meanwhile never misses it, and reads one whole version."""
    from tests.soak.values import Label, decode, encode  # noqa: PLC0415

    path = put_and_show(arena, "re", encode("re", Label(0, 0), 20_000))
    other = arena.author.path / "soak"
    arena.author.wait(arena.etcds.raw().revision())
    ending = threading.Event()
    found: list[str] = []

    def look() -> None:
        while not ending.is_set():
            try:
                if decode("re", path.read_bytes()) is None:
                    found.append("torn")
            except OSError as exc:
                found.append(str(exc))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for n in range(30):
            (other / "re.new").write_bytes(encode("re", Label(0, n + 1), 100 + 700 * n))
            (other / "re.new").rename(other / "re")
            nap(0.03)
    finally:
        ending.set()
        looking.join(30)
    check(not found, f"{len(found)} wrong looks: {found[:1]}")
    (other / "re").unlink()


# --- the daemon -----------------------------------------------------------------------------


@fault("29", "kill -9 of the daemon at random points of writing", "single", 15)
def daemon_killed(arena: Arena) -> None:
    """ENOTCONN, then a new mount over it. What was acknowledged is in etcd, the rest not at all."""
    load = arena.load
    for _ in range(KILLS):
        if load is not None:
            load.until_busy(2)
        nap(arena.chance.random() / 5)
        arena.author.kill()
        number = errno_of(lambda: os.listdir(arena.author.path))
        check(number == errno.ENOTCONN, f"not ENOTCONN but {os.strerror(number)}")
        held = contextlib.nullcontext() if load is None else load.held()
        with held:
            arena.author.mount()


@fault("29", "SIGSTOP of the daemon", "single", 15)
def daemon_stopped(arena: Arena) -> None:
    """Calls wait for it; when it goes on, so do they, and nothing old is shown."""
    os.kill(arena.reader.daemon, signal.SIGSTOP)
    nap(3)
    os.kill(arena.reader.daemon, signal.SIGCONT)


@fault("29", "kill -9 of the readers' daemon", "single", 15, reads_fail=True)
def reader_daemon_killed(arena: Arena) -> None:
    """ENOTCONN, nothing looks empty; the new mount shows what etcd holds."""
    arena.reader.kill()
    number = errno_of(lambda: os.listdir(arena.reader.path))
    check(number == errno.ENOTCONN, f"not ENOTCONN but {os.strerror(number)}")
    # Held: between the old mount and the new one the directory under them can be seen.
    held = contextlib.nullcontext() if arena.load is None else arena.load.held(readers=True)
    with held:
        arena.reader.mount()


_OPEN = """
import os, sys
fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
os.write(fd, b"not yet closed")
print("written", flush=True)
sys.stdin.read()
"""


@fault("30", "SIGTERM to a daemon that is in use", "single", 10)
def terminated(arena: Arena) -> None:
    """What was written and not yet closed is published; it unmounts and ends."""
    mount = arena.mount("ending", arena.etcds.url)
    with child(_OPEN, mount.path / "soak" / "pending") as process:
        assert process.stdout is not None
        process.stdout.readline()
        ended = os.pidfd_open(mount.daemon)
        try:
            os.kill(mount.daemon, signal.SIGTERM)
            check(select.select([ended], [], [], 30)[0], "the daemon does not end")
        finally:
            os.close(ended)
    check(not os.path.ismount(mount.path), "it is still mounted")
    found = arena.etcds.raw().get(layout.key("pending"))
    check(found is not None and found.value == b"not yet closed", "it was not published")
    arena.etcds.raw().delete(layout.key("pending"))


@fault("+", "the clock of the daemon goes back an hour", "single", 10)
def clock_stepped(arena: Arena) -> None:
    """Mtime is later with every change all the same; nothing else depends on the time of day."""
    clock = arena.home / "clock"
    clock.write_text("+0")
    words = ("env", f"LD_PRELOAD={_faketime()}", f"FAKETIME_TIMESTAMP_FILE={clock}")
    wrapper = (*words, "FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1")
    mount = arena.mount("stepped", arena.etcds.url)
    mount.close()
    mount.mount(wrapper=wrapper)
    try:
        times = []
        for n, offset in enumerate(("+0", "-3600", "+3600", "-7200")):
            clock.write_text(offset)
            mount.wait(arena.etcds.raw().put((layout.key("clock"), b"%d" % n)))
            file = mount.path / "soak" / "clock"
            check(file.read_bytes() == b"%d" % n, "the change is not seen")
            times.append(file.stat().st_mtime_ns)
            file.write_bytes(b"written %d" % n)
            times.append(file.stat().st_mtime_ns)
        check(times == sorted(set(times)), f"mtime goes back: {times}")
        check(times[-1] - times[0] < 3700 * 10**9, "mtime runs away")
    finally:
        mount.close()
    arena.etcds.raw().delete(layout.key("clock"))


def _faketime() -> str:
    for path in Path("/usr/lib").glob("*/faketime/libfaketime.so.1"):
        return str(path)
    raise FaultError("libfaketime is not installed (Debian: faketime)")
