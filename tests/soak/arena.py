"""One etcd, the mounts of it, and everybody who reads and writes while faults happen.

Knows: how a load is started, held and judged, and how it is found out that a mount has recovered:
it shows the newest revision, and equals etcd key by key. Does not know: the faults.

Concurrency: the conductor's thread; workers are processes. A watchdog kills the daemons when a
fault takes too long, so that nothing waits for ever on a mount that hangs.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, final

from tests.soak import compare, journal, layout
from tests.soak.compare import HungError
from tests.soak.control import Control, Flag, Mark, until
from tests.soak.etcds import Etcds, run
from tests.soak.events import event_of
from tests.soak.history import Event, Kind, Read, Verdict, Write, judge
from tests.soak.listening import DEAF, judge_heard
from tests.soak.mounts import ROOT, Mount
from tests.soak.propagation import Delay, seen_by_reading, seen_by_watching
from tests.soak.proxy import Mode, Proxy
from tests.soak.raw import Raw
from tests.soak.tamper import Tamper
from tests.soak.values import Label, encode, encode_counter, encode_line
from tests.soak.workers import Task

WRITERS: Final = 2
AUTHORS: Final = 1
READERS: Final = 3
HOLD_S: Final = 60.0
WATCHDOG_S: Final = 150.0
_PRELOADER: Final = 0
_PENS: Final = itertools.count(1)  # nobody writes under the name of another, in any epoch

TOKEN_TTL: Final = "--auth-token-ttl=2"
ROOT_LOGIN: Final = ("root", "secret")
APP_LOGIN: Final = ("app", "known")
ROLE: Final = ("--prefix=true", "app", "readwrite", "/")
TENANTS_RECORDS: Final = ("--prefix=true", "tenant", "readwrite", f"/.etcdfs/attrs/{layout.PREFIX}")
_USERS: Final = (
    ("role", "add", "app"),
    ("role", "grant-permission", *ROLE),
    ("user", "add", ":".join(APP_LOGIN)),
    ("user", "grant-role", "app", "app"),
    ("role", "add", "reader"),
    ("role", "grant-permission", "--prefix=true", "reader", "read", "/"),
    ("user", "add", "guest:known"),
    ("user", "grant-role", "guest", "reader"),
    ("user", "add", "nobody:known"),
    ("role", "add", "tenant"),
    ("role", "grant-permission", "--prefix=true", "tenant", "readwrite", layout.PREFIX),
    ("role", "grant-permission", *TENANTS_RECORDS),
    ("user", "add", "tenant:known"),
    ("user", "grant-role", "tenant", "tenant"),
)
"""Who there is where authentication is on."""

GRPC: Final = "ERROR grpc._cython"
BUGS: Final = ("this is a bug of etcdfs", "Traceback")


class FaultError(Exception):
    """Something other than the documented behaviour was seen."""


@dataclass(slots=True, kw_only=True)
class Conditions:
    """What a run is made with.

    Attributes:
        release: The etcd release's name.
        binary: Its binary.
        chance: Where all that is random comes from.
        defect: The seeded defect, if there is one.
        options: Further options of every mount.
        verdict: How what was read and written is judged, so far.
        raw: How soon a put was seen by a watch.
        mount: How soon by a reader of the mount under test.
    """

    release: str
    binary: Path
    chance: random.Random
    defect: str = ""
    options: tuple[str, ...] = ()
    verdict: Verdict = field(default_factory=Verdict)
    raw: list[Delay] = field(default_factory=list)
    mount: list[Delay] = field(default_factory=list)


@final
class Arena:
    """A running etcd with mounts. A context manager.

    Attributes:
        etcds: The members.
        reader: The mount under test.
        author: The mount that is written through.
        wire: The wire of the reader's mount, if it can be cut.
        author_wire: That of the author's.
        tamper: The proxy that can lie to the reader's mount, if there is one.
    """

    def __init__(self, conditions: Conditions, kind: str) -> None:
        self.conditions = conditions
        self.chance = conditions.chance
        self.kind = kind
        self.home = Path(tempfile.mkdtemp(prefix="etcdfs-soak-", dir="/dev/shm"))
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._remove)
        self._hung = False
        self._mounts: list[Mount] = []
        self._read_errors = 0
        self.wire: Proxy | None = None
        self.author_wire: Proxy | None = None
        self.tamper: Tamper | None = None
        self.load: Load | None = None
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def _remove(self) -> None:
        keep = os.environ.get("SOAK_KEEP_LOGS")
        if keep:
            for log in self.home.rglob("*log*"):
                if log.is_file():
                    shutil.copy(log, Path(keep) / f"{self.home.name}.{log.parent.name}.{log.name}")
        shutil.rmtree(self.home, ignore_errors=True)

    def _open(self) -> None:
        size = 3 if self.kind == "cluster" else 1
        isolated = self.kind == "cluster"
        arguments = (TOKEN_TTL,) if self.kind == "guarded" else ()
        self.etcds = Etcds(self.conditions.binary, self.home, size, *arguments, isolated=isolated)
        self._stack.callback(self.etcds.close)
        self.first = self._preload()
        reader_url = author_url = self.etcds.url
        if self.kind in {"single", "apart"}:
            self.wire, self.author_wire = (self._proxy() for _ in range(2))
            reader_url, author_url = self.wire.url, self.author_wire.url
        if self.kind == "tamper":
            self.tamper = Tamper(self.etcds.members[0].endpoint)
            self._stack.callback(self.tamper.close)
            reader_url = self.tamper.url
        options: tuple[str, ...] = ()
        if self.kind == "guarded":
            self.etcds.guard(ROOT_LOGIN, *_USERS)
            options = ("--user", ":".join(APP_LOGIN), "--audit-interval", "2")
        self.reader = self.mount("reader", reader_url, *options, defective=True)
        self.author = self.mount("author", author_url, *options, defective=True)

    def _proxy(self) -> Proxy:
        proxy = Proxy(self.etcds.members[0].endpoint)
        self._stack.callback(proxy.close)
        return proxy

    def mount(self, name: str, url: str, *options: str, defective: bool = False) -> Mount:
        """Make a mount, taken away with the arena."""
        defect = self.conditions.defect if defective else ""
        mount = Mount(
            self.home, name, url, "--cache", *self.conditions.options, *options, defect=defect
        )
        self._mounts.append(mount)
        self._stack.callback(mount.close)
        return mount

    def wires_down(self) -> None:
        """Cut the mounts off."""
        for wire in (self.wire, self.author_wire):
            if wire is not None:
                wire.set(Mode.REFUSE)

    def wires_up(self) -> None:
        """Connect them again."""
        for wire in (self.wire, self.author_wire):
            if wire is not None:
                wire.set(Mode.PASS)

    def _preload(self) -> int:
        """Put every key that is always there; return the revision."""
        label = Label(_PRELOADER, 1, 1)
        pairs = [
            (layout.key(name), encode(name, label, 100))
            for name in (*layout.TOGETHER, *layout.SINGLE, *layout.LASTING, *layout.MOUNTED)
        ]
        pairs += [(layout.key(name), encode_counter(name, label)) for name in layout.COUNTERS]
        pairs.append((layout.key(layout.LOG), encode_line(label)))
        revision: int = self.etcds.raw().put(*pairs)
        return revision

    # --- load -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def loaded(self) -> Iterator["Load"]:
        """Have everybody read and write during the body; then judge what they saw."""
        load = self.load = Load(self)
        try:
            yield load
        finally:
            self.load = None
            load.stop()
            self.conditions.verdict.add(load.verdict())

    # --- recovering -------------------------------------------------------------------------

    def recovered(self, bound_s: float, *, history: bool = True) -> float:
        """Return how long it takes until every mount equals etcd, the writers held.

        Args:
            bound_s: The longest it may take.
            history: Whether etcd's history goes on, so that a mount that says it shows a revision
                must not differ from it.

        Raises:
            FaultError: It took longer, or a mount that said it was in step was not.
        """
        began = time.monotonic()
        held = contextlib.nullcontext() if self.load is None else self.load.held()
        with held:
            entries, revision = self._truth()
            for mount in (self.reader, self.author):
                self._in_step(mount, entries, revision, began + bound_s, history=history)
        return time.monotonic() - began

    def _truth(self) -> tuple[dict[bytes, bytes], int]:
        def question(client: Any) -> tuple[dict[bytes, bytes], int]:
            return client.below(layout.PREFIX.encode()), client.revision()

        entries, revision = self.etcds.ask(question)
        return entries, revision

    def _in_step(
        self,
        mount: Mount,
        entries: dict[bytes, bytes],
        revision: int,
        deadline: float,
        *,
        history: bool,
    ) -> None:
        last = "it does not show the newest revision"
        top = mount.path / layout.PREFIX.strip("/")
        prefix = layout.PREFIX.encode()
        while True:
            late = time.monotonic() > deadline
            try:
                mount.wait(revision)
                found = compare.differences(entries, prefix, top)
            except (OSError, HungError) as exc:
                last = str(exc)
            else:
                if not found:
                    return
                last = "; ".join(found[:4])
                before = revision
                entries, revision = self._truth()
                # Unless a request that the fault held up has come to etcd only now.
                if history and revision == before:
                    raise FaultError(f"{mount.name} says it is in step, but differs: {last}")
            if late:
                raise FaultError(f"{mount.name} is not in step in time: {last}")
            threading.Event().wait(0.1)

    @contextlib.contextmanager
    def watchdog(self, seconds: float = WATCHDOG_S) -> Iterator[None]:
        """Kill the daemons if the body takes too long: whoever hangs in a mount goes on."""
        self._hung = False

        def bite() -> None:
            self._hung = True
            for mount in self._mounts:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(mount.daemon, signal.SIGKILL)

        timer = threading.Timer(seconds, bite)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if self._hung:
                raise FaultError(f"it hung for {seconds:.0f} s: the daemons were killed")

    def revive(self) -> None:
        """Undo what a fault that failed has left: etcd down, wires cut, daemons dead."""
        self.etcds.mend()
        self.wires_up()
        if self.tamper is not None:
            self.tamper.lie(None)
        for mount in (self.reader, self.author):
            if not os.path.exists(f"/proc/{mount.daemon}"):
                mount.mount()

    def bugs(self) -> list[str]:
        """Return what the daemons logged that says they are wrong."""
        found = []
        for mount in self._mounts:
            lines = mount.log().splitlines()
            for before, line in pairwise(("", *lines)):
                # gRPC logs that it cannot read its own error texts; that is not ours to mend.
                if any(bug in line for bug in BUGS) and GRPC not in before:
                    found.append(f"{before} / {line}")
        return found

    def control_file_system(self) -> Callable[[Mount], int] | None:
        """Return how to count a mount's requests that nobody has answered; None if it is hidden."""
        directory = self.home / "fusectl"
        directory.mkdir()
        try:
            run("mount", "-t", "fusectl", "none", directory)
        except RuntimeError:
            return None
        self._stack.callback(run, "umount", directory)

        def waiting(mount: Mount) -> int:
            number = os.minor(os.stat(mount.path).st_dev)
            return int((directory / str(number) / "waiting").read_text())

        return waiting

    # --- propagation ------------------------------------------------------------------------

    def measure_propagation(self, puts: int) -> None:
        """Time how soon a put is seen through the mount, and by a bare watch, in turn."""
        leader = self.etcds.leader()
        client, key = self.etcds.raw(leader), layout.key("probe")
        held = contextlib.nullcontext() if self.load is None else self.load.held(readers=True)
        with held:
            self.reader.wait(client.put((key, b"first")))
            top, each = self.reader.path, puts // 4
            for _ in range(4):
                self.conditions.mount += seen_by_reading(client, key, top, each)
                watcher = Raw([leader.endpoint])
                self.conditions.raw += seen_by_watching(client, watcher, key, each)


# --- the load -------------------------------------------------------------------------------


@final
class Load:
    """The workers of one epoch: a stretch of one history, judged as a whole."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._home = Path(tempfile.mkdtemp(prefix="load-", dir=arena.home))
        self.control = Control(self._home / "control", create=True)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._tasks: list[Task] = []
        self._first = arena.etcds.ask(lambda client: client.revision())
        self._preloaded = self._last_events()
        mounts = arena.reader.path / "soak", arena.author.path / "soak"
        reader, author = map(str, mounts)
        endpoints = arena.etcds.endpoints
        self._start("recorder", endpoints=endpoints)
        for _ in range(WRITERS):
            self._start("writer", endpoints=endpoints)
        for _ in range(AUTHORS):
            self._start("author", mount=author)
        for _ in range(READERS):
            self._start("reader", mount=reader)
        self._start("listener", mount=reader)
        self._start("waiter", mount=str(arena.reader.path))
        self.until_busy()

    def _last_events(self) -> list[Event]:
        """Return the state before the epoch as events."""
        entries = self._arena.etcds.ask(lambda client: client.entries(layout.PREFIX.encode()))
        return [event for kv in entries if (event := event_of(kv)) is not None]

    def _start(self, role: str, *, endpoints: tuple[str, ...] = (), mount: str = "") -> None:
        number = len(self._tasks) + 1
        task = Task(
            role=role,
            number=number,
            pen=next(_PENS),
            seed=self._arena.chance.randrange(1 << 30),
            control=str(self._home / "control"),
            journal=str(self._home / f"{number}.{role}"),
            endpoints=endpoints,
            mount=mount,
            first=self._first,
        )
        self._tasks.append(task)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "GRPC_VERBOSITY": "NONE"}
        with (self._home / f"{number}.errors").open("wb") as errors:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.soak.workers", task.encoded()],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                )
            )

    def numbers(self, *roles: str) -> list[int]:
        return [task.number for task in self._tasks if task.role in roles]

    def done(self, *roles: str) -> int:
        """Return how many turns workers have taken."""
        return sum(self.control.mark(number, Mark.DONE) for number in self.numbers(*roles))

    def failed_reads(self) -> int:
        return sum(self.control.mark(number, Mark.FAILED) for number in self.numbers("reader"))

    def until_busy(self, turns: int = 3) -> None:
        """Return when every worker that takes turns has taken some more."""
        roles = ("writer", "author", "reader")
        before = {n: self.control.mark(n, Mark.DONE) for n in self.numbers(*roles)}
        until(
            lambda: all(
                self.control.mark(n, Mark.DONE) >= done + turns for n, done in before.items()
            ),
            "the load goes on",
            HOLD_S,
        )

    def until_recorded(self, *, mark: bool = True) -> None:
        """Return when the recorder knows all that happened; for writers that are held.

        Without `mark`, the last thing that happened must have been to a key of the run.
        """
        etcds = self._arena.etcds
        if mark:
            revision = etcds.ask(lambda client: client.put((layout.key("mark"), b"")))
        else:
            revision = etcds.ask(lambda client: client.revision())
        until(
            lambda: self.control.flag(Flag.RECORDED) >= revision, "the recorder is in step", HOLD_S
        )

    @contextlib.contextmanager
    def held(self, *, readers: bool = False) -> Iterator[None]:
        """Hold the writers, and the readers if wanted, during the body."""
        flags = {Flag.HOLD_WRITERS: self.numbers("writer", "author")}
        if readers:
            flags[Flag.HOLD_READERS] = self.numbers("reader", "waiter")
        held = [flag for flag in flags if not self.control.flag(flag)]
        for flag in held:
            self.control.set_flag(flag, 1)
        try:
            for flag in held:
                until(
                    lambda flag=flag: all(  # type: ignore[misc]
                        self.control.mark(number, Mark.HELD) for number in flags[flag]
                    ),
                    "the workers are held",
                    HOLD_S,
                )
            yield
        finally:
            for flag in held:
                self.control.set_flag(flag, 0)

    def stop(self) -> None:
        """End all workers, the recorder last."""
        with contextlib.suppress(Exception), self.held():
            self.until_recorded()
        self.control.set_flag(Flag.STOP, 1)
        for process in self._processes:
            try:
                process.wait(HOLD_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(HOLD_S)

    def verdict(self) -> Verdict:
        """Judge what was read and written."""
        broken = [
            f"{task.role}: {errors}"
            for task in self._tasks
            if (errors := (self._home / f"{task.number}.errors").read_text()[-2000:])
        ]
        if broken:
            raise FaultError(f"a worker failed: {broken[0]}")
        files = {task: Path(task.journal) for task in self._tasks}
        events: list[Event] = [*self._preloaded]
        writes: list[Write] = []
        reads: list[Read] = []
        heard: list[Read] = []
        for task, path in files.items():
            match task.role:
                case "recorder":
                    events += [sighting.event for sighting in journal.sightings(path)]
                case "writer" | "author":
                    writes += list(journal.writes(path))
                case "reader":
                    reads += list(journal.reads(path))
                case "listener":
                    heard += list(journal.reads(path))
                case _:
                    pass
        verdict = judge(
            events,
            writes,
            [*reads, *(h for h in heard if h.key != DEAF)],
            counters=layout.COUNTING,
            first=self._first,
        )
        judge_heard(events, reads, heard, verdict)
        counts = Counter(os.strerror(read.counter) for read in reads if read.kind is Kind.ERROR)
        for reason, count in counts.items():
            verdict.failures[reason] += count
        shutil.rmtree(self._home)
        return verdict
