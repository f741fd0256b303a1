"""Many processes that make one system call each, all at the same moment.

A program of its own: it forks, which a test runner with threads should not. It reads a JSON list of
calls (`["rename", old, new]`), makes each in a process, and prints the list of their errnos.

Concurrency: processes; a barrier holds them until all are there.
"""

import json
import multiprocessing
import multiprocessing.synchronize
import os
import subprocess
import sys
from collections.abc import MutableSequence, Sequence

_TIMEOUT_S = 45.0


def race(calls: Sequence[tuple[str, ...]]) -> list[int]:
    """Make all calls at once; return the errno of each, 0 for success."""
    done = subprocess.run(
        [sys.executable, "-P", __file__],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        check=True,
        timeout=_TIMEOUT_S,
    )
    found: list[int] = json.loads(done.stdout)
    return found


def _create(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


_CALLS = {
    "create": _create,
    "mkdir": os.mkdir,
    "rmdir": os.rmdir,
    "unlink": os.unlink,
    "rename": os.rename,
}


def _run(
    call: list[str],
    ready: multiprocessing.synchronize.Barrier,
    found: MutableSequence[int],
    at: int,
) -> None:
    name, *arguments = call
    ready.wait(_TIMEOUT_S)
    try:
        _CALLS[name](*arguments)  # type: ignore[operator]
    except OSError as exc:
        found[at] = exc.errno or -1


def _main() -> None:
    calls: list[list[str]] = json.load(sys.stdin)
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(len(calls))
    found = context.Array("i", len(calls))
    runners = [
        context.Process(target=_run, args=(call, ready, found, at)) for at, call in enumerate(calls)
    ]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(_TIMEOUT_S)
        assert runner.exitcode == 0, "a runner hung or died"
    json.dump(found[:], sys.stdout)


if __name__ == "__main__":
    _main()
