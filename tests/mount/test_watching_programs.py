"""Programs that wait for files to change hear of what other clients put into etcd.

Each is started on a directory of the mount, says so, and then sees change after change, made as
fast as it reports them; on a read-write and on a read-only mount.
"""

import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO

import pytest

from etcdfs.fuse.procfs import Watches
from tests.mount.client import Client
from tests.mount.lab import Lab, Pool, memory_directory
from tests.support.churn import until
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted
from tests.support.watcher import EVENTS, Watcher

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

CHANGES = 100
RELOADS = 100 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 4
"""Of a whole program, each of which takes as long as a start of it."""
PATIENCE_S = 20.0
MODES = ((), ("--read-only",)) if os.geteuid() == 0 else ((),)


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"there is no {program}")


class Listener:
    """The lines that a program prints, each waited for.

    Attributes:
        passed: Those that were read.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.passed: list[str] = []
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
        while True:
            try:
                self.passed.append(self._lines.get(timeout=PATIENCE_S))
            except queue.Empty:
                pytest.fail(f"no line with {wanted!r} among {self.passed[-20:]}")
            if wanted in self.passed[-1]:
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


@needs("tail")
def test_tail_follows_each_new_content(seen: Lab) -> None:
    """It has the file open, so that each version is a file of its own; and it asks, of FUSE."""
    often = ("-s", "0.1", "--max-unchanged-stats=1")
    with running("tail", *often, "-n", "+1", "-F", str(seen.path / "f")) as heard:
        heard.until("0")
        for number in range(1, 5):
            seen.etcd.etcdctl("put", seen.key("f"), b"line %d\n" % number)
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


_INOTIFY = """
import sys
from pathlib import Path
from tests.support.watcher import EVENTS, Watcher
mask = sum(EVENTS[kind] for kind in sys.argv[2].split(","))
with Watcher(Path(sys.argv[1]), mask=mask) as watcher:
    print("waiting", flush=True)
    while True:
        watcher._read(60)
        print(*watcher.now(), sep="\\n", flush=True)
"""

_FSNOTIFY = "MOVED_TO,MOVED_FROM,CREATE,ATTRIB,MODIFY,MOVE_SELF,DELETE,DELETE_SELF"
"""What Go's fsnotify asks for (backend_inotify.go): viper, Traefik, Prometheus, Caddy."""

_SYSTEMD = "DELETE_SELF,MOVE_SELF,ATTRIB,CLOSE_WRITE,CREATE,DELETE,MOVED_FROM,MOVED_TO"
"""What systemd asks for with PathChanged= (src/core/path.c)."""


@needs("inotifywait")
def test_each_of_a_hundred_changes_of_etcdctl_is_heard_of(seen: Lab) -> None:
    """By all at once, each of which must have heard of one before the next is made."""
    path, file = str(seen.path), f"{seen.path}/f"
    watched = (sys.executable, "-c", _INOTIFY)
    programs = {
        ("inotifywait", "-m", path): ("established", "CLOSE_WRITE,CLOSE f", "CREATE e", "DELETE e"),
        (sys.executable, "-c", _WATCHFILES, path): (
            *("waiting", f"modified {file}", f"added {path}/e", f"deleted {path}/e"),
        ),
        (sys.executable, "-c", _WATCHDOG, path): (
            *("waiting", f"closed {file}", f"created {path}/e", f"deleted {path}/e"),
        ),
        (*watched, path, _FSNOTIFY): ("waiting", "MODIFY f", "CREATE e", "DELETE e"),
        (*watched, path, _SYSTEMD): ("waiting", "CLOSE_WRITE f", "CREATE e", "DELETE e"),
        (*watched, file, _FSNOTIFY): ("waiting", "MODIFY"),
        (*watched, file, _SYSTEMD): ("waiting", "CLOSE_WRITE"),
    }
    with ExitStack() as stack:
        heard = {
            stack.enter_context(running(*program)): lines for program, lines in programs.items()
        }
        for listener, lines in heard.items():
            listener.until(lines[0])
        for number in range(CHANGES):
            seen.etcd.etcdctl("put", seen.key("f"), b"%d" % number)
            for listener, lines in heard.items():
                listener.until(lines[1])
            assert (seen.path / "f").read_bytes() == b"%d" % number
        for turn, command in enumerate(("put", "del"), 2):
            seen.etcd.etcdctl(command, seen.key("e"), *([b"1"] if command == "put" else []))
            for listener, lines in heard.items():
                if turn < len(lines):
                    listener.until(lines[turn])


@pytest.mark.parametrize("mask", [_FSNOTIFY, _SYSTEMD], ids=["fsnotify", "systemd"])
def test_b129_a_file_that_is_open_is_replaced_as_by_a_rename_over_it(seen: Lab, mask: str) -> None:
    """Whoever watches the file itself, and does what is right for that, hears of all versions."""
    bits = sum(EVENTS[kind] for kind in mask.split(","))
    with memory_directory() as directory, ExitStack() as stack:
        (directory / "f").write_bytes(b"0")
        local = stack.enter_context(Watcher(directory / "f", mask=bits))
        (directory / "new").write_bytes(b"1")
        (directory / "new").rename(directory / "f")
        expected = local.now()
    with (seen.path / "f").open("rb"), Watcher(seen.path / "f", mask=bits) as watcher:
        seen.client.put(seen.key("f"), b"1")
        assert watcher.until(expected[-1]) == expected


@pytest.mark.parametrize(
    ("program", "told"),
    [(_WATCHFILES, "deleted"), (_WATCHDOG, "closed")],
    ids=["watchfiles", "watchdog"],
)
def test_b129_libraries_that_watch_a_file_that_is_open(seen: Lab, program: str, told: str) -> None:
    """To watchfiles it is gone, as after a rename over it; watchdog watches its directory."""
    with running(sys.executable, "-c", program, f"{seen.path}/f") as heard:
        heard.until("waiting")
        with (seen.path / "f").open("rb"):
            seen.client.put(seen.key("f"), b"1")
            heard.until(f"{told} {seen.path}/f")


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
        for number in range(1, RELOADS + 1):
            seen.etcd.etcdctl("put", seen.key("app.py"), _APP % number)
            heard.until(f"serving {number}")


_NGINX = """
daemon off; pid {home}/pid; error_log {home}/error.log notice;
events {{}}
http {{
    access_log off;
    server {{ listen unix:{home}/socket; include {site}; }}
}}
"""

_RELOADS_NGINX = """
nginx -c "$1" & trap 'kill $!' EXIT
inotifywait -m -e close_write --format %f "$2" 2>&1 | while read -r changed; do
    echo "$changed"
    [ "$changed" != site.conf ] || nginx -c "$1" -s reload
done
"""


@needs("nginx")
@needs("inotifywait")
def test_nginx_behind_a_loop_reloads(seen: Lab, tmp_path: Path) -> None:
    """Its configuration in etcd; what it answers says which one it has."""
    for name in ("body", "proxy", "fastcgi", "uwsgi", "scgi"):
        (tmp_path / name).mkdir()
    config = tmp_path / "nginx.conf"
    config.write_text(_NGINX.format(home=tmp_path, site=seen.path / "site.conf"))
    seen.put("site.conf", b"return 200 version-0;")

    def answers(version: int) -> bool:
        with closing(socket.socket(socket.AF_UNIX)) as client:
            client.settimeout(PATIENCE_S)
            client.connect(str(tmp_path / "socket"))
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with client.makefile("rb") as answer:
                return answer.read().endswith(b"version-%d" % version)

    with running("sh", "-c", _RELOADS_NGINX, "sh", str(config), str(seen.path)) as heard:
        heard.until("Watches established")
        until((tmp_path / "socket").exists)
        until((tmp_path / "pid").exists)
        for version in range(1, RELOADS + 1):
            seen.etcd.etcdctl("put", seen.key("site.conf"), b"return 200 version-%d;" % version)
            heard.until("site.conf")
            until(lambda version=version: answers(version))  # type: ignore[misc]
