"""How long a change takes until somebody sees it who waits for it: through a mount, and by a watch.

Knows: how to put a key and be told when it was seen. Whoever waits does nothing until the change is
there: the mount wakes its reader (`user.etcdfs.wait.REVISION`), who then opens and reads the file;
the watch wakes the other. So nobody takes the processor from anybody.

Concurrency: a thread that waits, and the caller, who puts.
"""

import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from tests.soak.raw import Raw, RawError

_PATIENCE_S: Final = 30.0


class Delay(NamedTuple):
    """How long after a put was sent, and after it was answered, it was seen, in seconds."""

    of_sending: float
    of_answer: float


def seen_by_reading(client: Raw, key: bytes, top: Path, puts: int) -> list[Delay]:
    """Put a key so many times, each time until a reader whom the mount wakes has read it."""
    path = f"{top}{key.decode()}"
    found = []
    with ThreadPoolExecutor(1) as pool:
        for n in range(puts):
            value = b"read %d" % n
            revision = client.revision() + 1
            waiting = threading.Event()
            looking = pool.submit(_look, top, revision, path, value, waiting)
            waiting.wait(_PATIENCE_S)
            found.append(_delay(*_put(client, key, value), looking.result(2 * _PATIENCE_S)))
    return found


def seen_by_watching(client: Raw, watcher: Raw, key: bytes, puts: int) -> list[Delay]:
    """Put a key so many times, each time until a watch has brought it."""
    seen: queue.Queue[tuple[bytes, float]] = queue.Queue()
    start = client.revision() + 1
    watching = threading.Thread(target=_watch, args=(watcher, key, start, seen))
    watching.start()
    found = []
    try:
        for n in range(puts):
            value = b"watched %d" % n
            sent, answered = _put(client, key, value)
            while (told := seen.get(timeout=_PATIENCE_S))[0] != value:
                pass
            found.append(_delay(sent, answered, told[1]))
    finally:
        watcher.close()
        watching.join(_PATIENCE_S)
    return found


def _put(client: Raw, key: bytes, value: bytes) -> tuple[float, float]:
    sent = time.monotonic()
    client.put((key, value))
    return sent, time.monotonic()


def _delay(sent: float, answered: float, seen: float) -> Delay:
    return Delay(seen - sent, max(0.0, seen - answered))


def _look(top: Path, revision: int, path: str, value: bytes, waiting: threading.Event) -> float:
    """Return when the value was read."""
    waiting.set()
    os.getxattr(top, f"user.etcdfs.wait.{revision}")
    with open(path, "rb", buffering=0) as file:
        found = file.read()
    seen = time.monotonic()
    if found != value:
        raise TimeoutError(f"{path} shows {found!r}, not {value!r} of revision {revision}")
    return seen


def _watch(watcher: Raw, key: bytes, start: int, seen: "queue.Queue[tuple[bytes, float]]") -> None:
    try:
        for response in watcher.watch(key, start):
            moment = time.monotonic()
            for event in response.events:
                seen.put((event.kv.value, moment))
    except RawError:
        return  # closed: all has been seen
