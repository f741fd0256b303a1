"""What a mount shows below the run's prefix, key by key, to be compared with etcd.

Run as `python -m tests.soak.compare TOP`: a process of its own, because one that looks into a
mount whose daemon hangs, hangs too, and must be one that can be ended.

Concurrency: one process.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_PATIENCE_S: Final = 60.0


class HungError(Exception):
    """The mount did not answer."""


def digest(value: bytes) -> str:
    return f"{len(value)} {hashlib.sha256(value).hexdigest()[:16]}"


def shown_by(top: Path) -> dict[str, str]:
    """Return every file below `top` and what it holds, every empty directory with a `/`."""
    found = {}
    for directory, directories, files in os.walk(top, onerror=_fail):
        for name in files:
            path = os.path.join(directory, name)
            with open(path, "rb", buffering=0) as file:
                found[os.path.relpath(path, top)] = digest(file.read())
        if not files and not directories:
            found[os.path.relpath(directory, top) + "/"] = ""
    return found


def held_by(entries: Mapping[bytes, bytes], prefix: bytes) -> dict[str, str]:
    """Return the same of etcd's keys; a marker only counts where nothing else is."""
    names = {key[len(prefix) :].decode(): value for key, value in entries.items()}
    found = {name: digest(value) for name, value in names.items() if not name.endswith("/")}
    for marker in names:
        if marker.endswith("/") and not any(
            other.startswith(marker) and other != marker for other in names
        ):
            found[marker] = ""
    return found


def differences(entries: Mapping[bytes, bytes], prefix: bytes, top: Path) -> list[str]:
    """Say where a mount and etcd differ.

    Raises:
        HungError: The mount did not answer, or failed.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tests.soak.compare", str(top)],
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
            cwd=Path(__file__).parent.parent.parent,
        )
    except subprocess.TimeoutExpired as exc:
        raise HungError(f"{top} does not answer") from exc
    if done.returncode:
        raise HungError(done.stderr.strip().rpartition("\n")[2])
    shown: dict[str, str] = json.loads(done.stdout)
    held = held_by(entries, prefix)
    found = [f"{name}: missing" for name in sorted(held.keys() - shown.keys())]
    found += [f"{name}: not in etcd" for name in sorted(shown.keys() - held.keys())]
    common = sorted(held.keys() & shown.keys())
    found += [f"{name}: {shown[name]}, not {held[name]}" for name in common
              if shown[name] != held[name]]  # fmt: skip
    return found


def _fail(error: OSError) -> None:
    raise error


if __name__ == "__main__":
    print(json.dumps(shown_by(Path(sys.argv[1]))))  # noqa: T201 - the answer
