"""Whatever programs and other clients do: the mount is what tmpfs is, and etcd holds that.

A state machine makes real system calls on a mount of a real etcd, and the same ones on a directory
on tmpfs: each must have the same result, or fail with the same errno, and both trees must stay
alike: names, types, modes, owners, times, contents, links, extended attributes, and what is open,
with or without a name. Between the calls another client puts and deletes keys, and a second mount
changes files; on tmpfs that is what it is to this mount: another file under the same name.

At the end all is closed: then etcd is compared with the tmpfs tree key by key, and the mount must
have let go of every old version.

Where etcdfs differs, `DIFFERENCES` (ground.py) says so; docs/semantics.md ("Differences from POSIX") has the reasons.
"""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from tests.mount.lab import MODES, Pool
from tests.mount.machine.ground import (
    DIFFERENCES,
    OLD_TIMES,
    Where,
    any_modes,
    any_sizes,
    any_targets,
    any_where,
    path_at,
    read_file,
    write_file,
)
from tests.mount.machine.local import LocalRules
from tests.mount.machine.twins import outcome
from tests.mount.posix.calls import renameat2

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

SHARES: Final = {"--cache": 3, "--no-cache": 14}
"""Which part of a profile's examples a mode has: one of a real mount takes a second."""


class Machine(LocalRules):
    """Other clients, besides."""

    @rule(where=any_where, size=st.sampled_from([0, 1, 5, 4096, 5000]), link=any_targets)
    def put(self, where: Where, size: int, link: bytes) -> None:
        path = self.pick(where)
        kind = self.kind(path)
        if not self.is_real(path) or kind not in {0, stat.S_IFREG, stat.S_IFLNK}:
            return
        self.publish()
        value = link if kind == stat.S_IFLNK else self.data(size)
        self.lab.put(path, value)
        self.replace_value(path, value)

    @rule(where=any_where)
    def delete(self, where: Where) -> None:
        path = self.pick(where)
        if not self.is_real(path) or self.kind(path) in {0, stat.S_IFDIR}:
            return
        self.publish()
        self.deleted[self.lab.key(path)] = self.lab.delete(path)
        os.unlink(self.at(path))
        self.vanish(os.path.dirname(path))

    @rule(where=any_where)
    def delete_below(self, where: Where) -> None:
        path = self.pick(where)
        if not self.is_real(path) or self.kind(path) != stat.S_IFDIR:
            return
        self.publish()
        below = self.lab.key(path) + b"/"
        keys = [found.key for found in self.client.below(below)]
        revision = self.client.delete_below(below)
        self.lab.shown(revision)
        self.deleted |= dict.fromkeys(keys, revision)
        shutil.rmtree(self.at(path))
        self.vanish(os.path.dirname(path))

    @rule(where=any_where, size=any_sizes)
    def delete_and_put(self, where: Where, size: int) -> None:
        """Another client makes a key anew: it has none of the old one's attributes."""
        path = self.pick(where)
        if not self.is_real(path) or self.kind(path) in {0, stat.S_IFDIR}:
            return
        self.publish()
        self.deleted[self.lab.key(path)] = self.client.delete(self.lab.key(path))
        value = self.data(size)
        self.lab.put(path, value)
        inode = os.lstat(self.at(path)).st_ino
        for slot in self.twins.slots:
            slot.is_overtaken |= slot.inode == inode
        os.unlink(self.at(path))
        self.replace_value(path, value)

    @rule(
        where=any_where,
        call=st.sampled_from(
            ["mkdir", "rmdir", "unlink", "write", "chmod", "setxattr", "symlink", "utimens"]
        ),
        size=any_sizes,
        mode=any_modes,
    )
    def second(self, where: Where, call: str, size: int, mode: int) -> None:
        """The second mount changes something."""
        path = self.pick(where)
        if not self.is_real(path):
            return
        self.publish()
        kind = self.kind(path)
        if call == "write" and kind:
            if kind == stat.S_IFREG:
                data = self.data(size)
                before = read_file(self.at(path))
                self.other.wait(self.client.revision())
                write_file(self.elsewhere.path(path), data, mode)
                if data != before:
                    self.replace_value(path, data)
        elif kind in {0, stat.S_IFREG, stat.S_IFDIR} or call in {"unlink", "rmdir", "mkdir"}:
            self.on_second(call, path, self.data(size), mode)
        self.lab.shown(self.client.revision())

    def on_second(self, call: str, path: bytes, data: bytes, mode: int) -> None:
        calls: dict[str, Callable[[bytes], Any]] = {
            "mkdir": lambda at: os.mkdir(at, mode),
            "rmdir": os.rmdir,
            "unlink": os.unlink,
            "write": lambda at: write_file(at, data, mode),
            "chmod": lambda at: os.chmod(at, mode),
            "setxattr": lambda at: os.setxattr(at, "user.a", data),
            "symlink": lambda at: os.symlink(b"b", at),
            "utimens": lambda at: os.utime(at, ns=(OLD_TIMES[0], OLD_TIMES[1])),
        }
        done = self.elsewhere_same(call, lambda s: calls[call](s.path(path)))
        if done and call == "mkdir":
            self.marked.add(os.stat(self.at(path)).st_ino)
        if done and call == "utimens":
            self.twins.untimed.discard(os.stat(self.at(path)).st_ino)

    @rule(source=any_where, into=any_where, flags=st.sampled_from([0, 0, 1, 2]))
    def second_rename(self, source: Where, into: Where, flags: int) -> None:
        """The second mount renames what is not open here: to this one it is made anew."""
        old, new = self.pick(source), self.pick(into)
        moved = (old, new) if flags & 2 else (old,)
        if not (self.is_real(old) and self.is_real(new)) or self.is_open(*moved):
            return
        self.publish()
        self.elsewhere_same(
            f"rename {old!r} {new!r} {flags}",
            lambda s: renameat2(path_at(s, old), path_at(s, new), flags),
        )
        self.lab.shown(self.client.revision())

    @rule(
        where=any_where,
        how=st.sampled_from(["append", "part", "emptied", "whole", "deleted"]),
        size=st.sampled_from([1, 5, 5000]),
    )
    def conflict(self, where: Where, how: str, size: int) -> None:
        """Another client puts a key that is being written here. `ESTALE` differs (B14, B15)."""
        path = self.pick(where)
        if not self.is_real(path) or self.kind(path) != stat.S_IFREG or self.is_open(path):
            return
        before = read_file(self.at(path))
        if len(before) < 2:
            return
        flags = {
            "append": os.O_WRONLY | os.O_APPEND,
            "part": os.O_RDWR,
            "emptied": os.O_RDWR | os.O_TRUNC,
            "whole": os.O_WRONLY,
            "deleted": os.O_RDWR,
        }[how]
        ours = self.data(len(before) if how == "whole" else 1)
        theirs = self.data(size)
        fd = os.open(self.twins.mount.path(path), flags)
        try:
            os.write(fd, ours)
            if how == "deleted":
                self.deleted[self.lab.key(path)] = self.lab.delete(path)
            else:
                self.lab.put(path, theirs)
        finally:
            closed = outcome(lambda _: os.close(fd), self.twins.mount)[0]
        expected = DIFFERENCES["ESTALE"][0] if how == "part" else None
        if closed != expected:
            self.twins.differ(f"close of {path!r}, {how}: {closed} instead of {expected}")
        if how == "deleted":
            os.unlink(self.at(path))
            self.vanish(os.path.dirname(path))
        else:
            value = {"append": theirs + ours, "part": theirs}.get(how, ours)
            self.replace_value(path, value)


@pytest.mark.oldest_and_newest_etcd
@pytest.mark.timeout(0)  # each example has the watchdog's bound
@pytest.mark.parametrize("mode", MODES)
def test_the_mount_is_what_tmpfs_is(pool: Pool, etcd_binary: Path, mode: str) -> None:
    class Here(Machine):
        pass

    Here.pool, Here.etcd_binary, Here.mode = pool, etcd_binary, mode
    profile = settings.get_profile(settings.get_current_profile_name())
    examples = max(1, profile.max_examples // SHARES[mode])
    run_state_machine_as_test(Here, settings=settings(profile, max_examples=examples))
