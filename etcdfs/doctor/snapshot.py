"""Whether the snapshot of `--state-dir` would be shown, if a mount had to begin with it.

Knows: the questions. Does not know: how it is stored, and what makes it another's.

Concurrency: it is read in a thread, bounded; a mount may write it meanwhile.
"""

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import trio

from etcdfs.consistency.snapshot import Manifest, Stream, fault_in
from etcdfs.consistency.staleness import UNLIMITED
from etcdfs.doctor.machine import Finding, Level
from etcdfs.errors import SnapshotDamagedError
from etcdfs.options import MountOptions
from etcdfs.snapshots.snapshot_file import read_through
from etcdfs.snapshots.snapshots import identity_of

READ_TIMEOUT_S: Final = 60.0
"""How long the file may take to be read."""


async def check_snapshot(options: MountOptions, *, cluster: int) -> AsyncIterator[Finding]:
    """Read all of the snapshot that a mount would begin with; `cluster` is 0 if etcd is away."""
    if options.state_dir is None:
        return
    directory = Path(options.state_dir)
    try:
        with trio.fail_after(READ_TIMEOUT_S):
            manifest = await trio.to_thread.run_sync(
                partial(read_through, directory), abandon_on_cancel=True
            )
    except trio.TooSlowError:
        yield _found(Level.PROBLEM, f"it is not read within {READ_TIMEOUT_S:.0f} s")
        return
    except (OSError, SnapshotDamagedError) as exc:
        yield _found(Level.PROBLEM, f"it would be refused: {exc}")
        return
    if manifest is None:
        yield _found(Level.NOTE, f"there is none yet in {directory}")
        return
    fault = fault_in(manifest, replace(identity_of(options), cluster=cluster))
    if fault is not None:
        yield _found(Level.PROBLEM, f"it would be refused: {fault}")
        return
    yield _check_age(manifest, options.max_stale_s)


def _check_age(manifest: Manifest, max_stale_s: float) -> Finding:
    keys = manifest.streams[Stream.KEYS]
    age_s = time.time() - manifest.heard_ns / 1e9
    what = f"{keys.rows} keys of revision {keys.position.revision}"
    if age_s < 0:
        return _found(Level.PROBLEM, f"{what}, from the future: a clock was put back")
    if max_stale_s != UNLIMITED and age_s > max_stale_s:
        return _found(Level.NOTE, f"{what}, {age_s:.0f} s old: --max-stale would not have it shown")
    return _found(Level.OK, f"{what}, {age_s:.0f} s old")


def _found(level: Level, message: str) -> Finding:
    return Finding(level, "snapshot", message)
