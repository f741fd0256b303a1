"""Programs that wait for files to change hear of what other clients put into etcd.

Each is started on a directory of the mount, says so, and then sees change after change, made as
fast as it reports them; on a read-write and on a read-only mount.
"""

import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import pytest

from etcdfs.fuse.procfs import Watches
from tests.mount.client import Client
from tests.mount.lab import Lab, Pool
from tests.support.churn import until
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

CHANGES = 100
PATIENCE_S = 20.0
MODES = ((), ("--read-only",)) if os.geteuid() == 0 else ((),)


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"there is no {program}")


class Listener:
    """The lines that a program prints, each waited for."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._lines: queue.Queue[str] = queue.Queue()
        assert process.stdout is not None
        self._thread = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._lines.put(line.rstrip("\n"))

    def close(self) -> None:
        """Return when all that was printed is read; the program has ended."""
        self._thread.join()

    def until(self, wanted: str) -> None:
        """Read on to a line with some text in it."""
        seen = []
        while True:
            try:
                seen.append(self._lines.get(timeout=PATIENCE_S))
            except queue.Empty:
                pytest.fail(f"no line with {wanted!r} among {seen[-20:]}")
            if wanted in seen[-1]:
                return


@contextmanager
def running(*command: str, cwd: Path | None = None) -> Iterator[Listener]:
    process = subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    listener = Listener(process)
    try:
        yield listener
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # reloaders have children
        process.wait()
        listener.close()


@pytest.fixture(params=MODES, ids=lambda options: "ro" if options else "rw")
def mounted(
    request: pytest.FixtureRequest, pool: Pool, shared_etcd: EtcdProcess, etcd_binary: Path
) -> Mounted:
    return pool.mounted(etcd_binary, "--cache", *request.param)


@pytest.fixture
def seen(mounted: Mounted, pool: Pool, shared_etcd: EtcdProcess) -> Iterator[Lab]:
    """Yield a fresh directory that has come into the mount from outside."""
    name = pool.name()
    with closing(Client(shared_etcd.endpoint)) as client:
        lab = Lab(shared_etcd, client, mounted, mounted.path / name, b"/%s/" % name.encode())
        lab.put("f", b"0\n")
        until(lambda: not mounted.statistics()["inotify"]["waiting"])
        yield lab


@needs("inotifywait")
def test_inotifywait(seen: Lab) -> None:
    with running("inotifywait", "-m", str(seen.path)) as heard:
        heard.until("Watches established")
        for number in range(CHANGES):
            seen.client.put(seen.key("f"), b"%d\n" % number)
            heard.until("CLOSE_WRITE,CLOSE f")
            assert (seen.path / "f").read_bytes() == b"%d\n" % number


@needs("tail")
def test_tail_follows_each_new_content(seen: Lab) -> None:
    """It has the file open, so that each version is a file of its own; and it asks, of FUSE."""
    often = ("-s", "0.1", "--max-unchanged-stats=1")
    with running("tail", *often, "-n", "+1", "-F", str(seen.path / "f")) as heard:
        heard.until("0")
        for number in range(1, 5):
            seen.client.put(seen.key("f"), b"line %d\n" % number)
            heard.until(f"line {number}")


_WATCHFILES = """
import sys, watchfiles
for changes in watchfiles.watch(sys.argv[1], debounce=20, step=5, yield_on_timeout=True, rust_timeout=200):
    print(*(f"{kind.name} {path}" for kind, path in changes) if changes else ("waiting",))
"""

_WATCHDOG = """
import sys, threading
from watchdog.events import FileSystemEventHandler
from watchdog.observers.inotify import InotifyObserver
class Handler(FileSystemEventHandler):
    def on_any_event(self, event):
        print(event.event_type, event.src_path)
observer = InotifyObserver()
observer.schedule(Handler(), sys.argv[1], recursive=True)
observer.start()
print("waiting")
threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("program", "created", "changed", "deleted"),
    [
        (_WATCHFILES, "added", "modified", "deleted"),
        (_WATCHDOG, "created", "closed", "deleted"),
    ],
    ids=["watchfiles", "watchdog"],
)
def test_libraries_of_reloaders(
    seen: Lab, program: str, created: str, changed: str, deleted: str
) -> None:
    with running(sys.executable, "-c", program, str(seen.path)) as heard:
        heard.until("waiting")
        for number in range(CHANGES):
            seen.client.put(seen.key("f"), b"%d\n" % number)
            heard.until(f"{changed} {seen.path}/f")
        seen.client.put(seen.key("d/new"), b"")
        heard.until(f"{created} {seen.path}/d")
        seen.client.put(seen.key("e"), b"")
        heard.until(f"{created} {seen.path}/e")
        seen.client.delete(seen.key("e"))
        heard.until(f"{deleted} {seen.path}/e")


_APP = b"""
import pathlib
version = %d
async def app(scope, receive, send):
    pass
print("serving", version, flush=True)
"""


def test_uvicorn_reloads(seen: Lab) -> None:
    """A program and its source in etcd: each change starts it again."""
    seen.put("app.py", _APP % 0)
    arguments = ("--port", "0", "--lifespan", "off", "--reload", "--reload-dir", str(seen.path))
    command = (sys.executable, "-B", "-m", "uvicorn", "app:app", *arguments)
    with running(*command, cwd=seen.path) as heard:
        heard.until("serving 0")
        place = seen.path.stat()
        until(lambda: place.st_ino in Watches(place.st_dev).find()[0])  # it watches after that
        for number in range(1, 4):
            seen.client.put(seen.key("app.py"), _APP % number)
            heard.until(f"serving {number}")
