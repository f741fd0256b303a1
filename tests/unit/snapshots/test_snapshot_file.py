"""The snapshot on disk: what is written is there, whole, whatever ends the writing."""

import os
import random
import shutil
import signal
import sqlite3
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from etcdfs.consistency.snapshot import Identity, Manifest, Position, Stream
from etcdfs.errors import SnapshotDamagedError, SnapshotWriteError, StateDirectoryError
from etcdfs.keyspace.store import Event, KeyValue, Revision, Tombstone
from etcdfs.snapshots.snapshot_file import NAME, Changes, SnapshotFile
from tests.support.profile import NIGHTLY

HEAD = Manifest(
    identity=Identity(cluster=1, prefix=b"/", user="", attributes=True, endpoints=("a:1",)),
    heard_ns=1,
)
State = dict[bytes, KeyValue]


def entry(key: bytes, revision: int, value: bytes | None = None) -> KeyValue:
    found = b"%d" % revision if value is None else value
    return KeyValue(key, found, Revision(revision), Revision(revision), 1)


def at(revision: int) -> Position:
    return Position(Revision(revision), (entry(b"/witness", revision),))


def commit(file: SnapshotFile, revision: int, *events: Event, listed: bool = False) -> None:
    file.commit(HEAD, {Stream.KEYS: Changes(events=events, position=at(revision), listed=listed)})


def listing(file: SnapshotFile, revision: int, state: Mapping[bytes, KeyValue]) -> None:
    entries = [state[key] for key in sorted(state)]
    half = len(entries) // 2
    file.stage(Stream.KEYS, entries[:half], first=True)
    file.stage(Stream.KEYS, entries[half:], first=False)
    commit(file, revision, listed=True)


def found(file: SnapshotFile) -> tuple[int, State] | None:
    """Return the revision and the entries; None if there is nothing.

    Raises:
        SnapshotDamagedError: They are not what was written.
    """
    if file.damage:
        raise SnapshotDamagedError(file.damage)
    if file.manifest is None:
        return None
    pages = list(file.pages(Stream.KEYS))
    entries = [entry for page in pages for entry in page]
    assert [entry.key for entry in entries] == sorted(entry.key for entry in entries)
    revision = file.manifest.streams[Stream.KEYS].position.revision
    return revision, {entry.key: entry for entry in entries}


def read(directory: Path) -> tuple[int, State] | None:
    with closing(SnapshotFile.open(directory)) as file:
        return found(file)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SnapshotFile]:
    with closing(SnapshotFile.open(tmp_path / "state")) as opened:
        yield opened


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """Return a directory where fsync(2) costs nothing."""
    home = Path(tempfile.mkdtemp(prefix="etcdfs-test-", dir="/dev/shm"))
    try:
        yield home
    finally:
        shutil.rmtree(home)


# --- what is written ------------------------------------------------------------------------


def test_what_is_listed_and_what_changed_is_read_back(file: SnapshotFile) -> None:
    state = {key: entry(key, 3) for key in (b"/b", b"/a", b"/c\xff", b"")}
    assert found(file) is None
    listing(file, 3, state)
    assert found(file) == (3, state)
    commit(file, 5, entry(b"/b", 4), Tombstone(b"/a", Revision(5)), Tombstone(b"/x", Revision(5)))
    state[b"/b"] = entry(b"/b", 4)
    del state[b"/a"]
    assert found(file) == (5, state)
    assert file.value(b"/b", Revision(4)) == b"4"
    assert file.value(b"/b", Revision(3)) is None
    assert file.value(b"/a", Revision(3)) is None
    listing(file, 9, {b"/n": entry(b"/n", 9)})
    assert found(file) == (9, {b"/n": entry(b"/n", 9)})


def test_what_is_older_than_what_is_there_is_passed_over(file: SnapshotFile) -> None:
    listing(file, 3, {b"/a": entry(b"/a", 7)})  # read ahead of the watch
    commit(file, 5, entry(b"/a", 5), Tombstone(b"/a", Revision(6)))
    assert found(file) == (5, {b"/a": entry(b"/a", 7)})


def test_a_listing_counts_when_it_is_whole(file: SnapshotFile) -> None:
    state = {b"/a": entry(b"/a", 3)}
    listing(file, 3, state)
    file.stage(Stream.KEYS, [entry(b"/b", 4)], first=True)
    assert found(file) == (3, state)
    commit(file, 5, entry(b"/c", 5))
    assert found(file) == (5, state | {b"/c": entry(b"/c", 5)}), "the old one is kept up meanwhile"
    file.stage(Stream.KEYS, [entry(b"/d", 6)], first=True)
    commit(file, 6, listed=True)
    assert found(file) == (6, {b"/d": entry(b"/d", 6)}), "nothing of a listing that was left"


def test_a_stream_that_is_dropped_is_gone(file: SnapshotFile) -> None:
    listing(file, 3, {})
    file.stage(Stream.ATTRIBUTES, [entry(b"/s", 2)], first=True)
    changes = Changes(events=(), position=at(2), listed=True)
    file.commit(HEAD, {Stream.ATTRIBUTES: changes})
    assert [len(page) for page in file.pages(Stream.ATTRIBUTES)] == [1]
    file.commit(HEAD, {}, dropped=[Stream.ATTRIBUTES])
    assert file.manifest is not None
    assert list(file.manifest.streams) == [Stream.KEYS]


def test_b86_another_mount_is_kept_out_and_others_users_too(
    tmp_path: Path, file: SnapshotFile
) -> None:
    with pytest.raises(StateDirectoryError, match="used by another mount"):
        SnapshotFile.open(file.path.parent)
    listing(file, 3, {b"/a": entry(b"/a", 3)})
    for path in file.path.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(StateDirectoryError, match="nobody else may write"):
        SnapshotFile.open(open_to_all)
    linked = tmp_path / "linked"
    linked.mkdir(mode=0o700)
    (linked / NAME).symlink_to(file.path)
    with pytest.raises(StateDirectoryError, match="cannot be opened"):
        SnapshotFile.open(linked)
    with pytest.raises(StateDirectoryError, match="No such file"):
        SnapshotFile.open(tmp_path / "not" / "there")


def test_what_cannot_be_written_leaves_what_there_was(file: SnapshotFile) -> None:
    state = {b"/a": entry(b"/a", 3)}
    listing(file, 3, state)
    with closing(sqlite3.connect(file.path)) as full:
        (pages,) = full.execute("PRAGMA page_count").fetchone()
    file._writer.execute(f"PRAGMA max_page_count = {pages}")  # a disk that is full
    large = entry(b"/large", 4, bytes(100_000))
    with pytest.raises(SnapshotWriteError, match="full"):
        commit(file, 4, entry(b"/a", 4), large)
    assert found(file) == (3, state)
    file._writer.execute("PRAGMA max_page_count = 100000")
    commit(file, 4, entry(b"/a", 4), large)
    assert found(file) == (4, {b"/a": entry(b"/a", 4), b"/large": large})


def test_what_is_discarded_leaves_no_value_behind(file: SnapshotFile) -> None:
    listing(file, 3, {b"/a": entry(b"/a", 3, b"a secret")})
    file.discard()
    assert found(file) is None
    assert all(b"a secret" not in path.read_bytes() for path in file.path.parent.iterdir())
    listing(file, 4, {b"/b": entry(b"/b", 4)})
    assert found(file) == (4, {b"/b": entry(b"/b", 4)})


# --- damage ---------------------------------------------------------------------------------


def closed_one(directory: Path, state: State) -> bytes:
    with closing(SnapshotFile.open(directory)) as file:
        listing(file, 3, state)
    assert [path.name for path in directory.iterdir()] == [NAME]
    return (directory / NAME).read_bytes()


SMALL = {key: entry(key, 3) for key in (b"/a", b"/b")}


def believed(directory: Path, content: bytes) -> State | None:
    """Return what is read from a file with this content; None if it is refused."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    (directory / NAME).write_bytes(content)
    try:
        read_back = read(directory)
    except (SnapshotDamagedError, StateDirectoryError):
        return None
    return None if read_back is None else read_back[1]


def test_b86_a_file_that_was_cut_is_refused(in_memory: Path) -> None:
    whole = closed_one(in_memory / "whole", SMALL)
    assert believed(in_memory / "cut", whole) == SMALL
    for length in range(0, len(whole), 37):
        assert believed(in_memory / "cut", whole[:length]) is None, length


def test_b86_no_changed_byte_changes_what_is_believed(in_memory: Path) -> None:
    whole = closed_one(in_memory / "whole", SMALL)
    used = [at for at, byte in enumerate(whole) if byte]
    refused = 0
    for at_byte in used:
        changed = bytearray(whole)
        changed[at_byte] ^= 0x55
        read_back = believed(in_memory / "changed", bytes(changed))
        assert read_back in (None, SMALL), at_byte
        refused += read_back is None
    assert refused > len(used) / 2, "most of what is not empty says something"


def test_b86_another_format_is_refused(tmp_path: Path) -> None:
    closed_one(tmp_path, SMALL)
    with closing(sqlite3.connect(tmp_path / NAME)) as other:
        other.execute("PRAGMA user_version = 2")
    with closing(SnapshotFile.open(tmp_path)) as file:
        assert file.manifest is None
        assert file.damage == "it is of format 2, not 1"
        file.discard()
        assert (file.manifest, file.damage) == (None, "")
        listing(file, 3, SMALL)
        assert found(file) == (3, SMALL)


def test_b86_an_entry_that_got_lost_is_missed(tmp_path: Path) -> None:
    closed_one(tmp_path, SMALL)
    with closing(sqlite3.connect(tmp_path / NAME)) as other, other:
        assert other.execute("DELETE FROM keys_1 WHERE key = ?", (b"/a",)).rowcount == 1
    with pytest.raises(SnapshotDamagedError, match="2 keys were written and 1 found"):
        read(tmp_path)


# --- the end of the power, and of the process -----------------------------------------------


def test_b85_a_write_cut_at_any_byte_leaves_the_old_or_the_new(in_memory: Path) -> None:
    """What is on disk when a write is cut: the file as it was, and the log up to there.

    SQLite writes the file itself only once the log is on disk whole.
    """
    state = {b"/a": entry(b"/a", 4), b"/n": entry(b"/n", 5)}
    with closing(SnapshotFile.open(in_memory / "state")) as file:
        listing(file, 3, SMALL)
        names = (NAME, f"{NAME}-wal")
        before = {name: (in_memory / "state" / name).read_bytes() for name in names}
        commit(file, 5, *state.values(), Tombstone(b"/b", Revision(5)))
        after = {name: (in_memory / "state" / name).read_bytes() for name in names}
    assert before[NAME] == after[NAME], "it is all in the log"
    start, end = len(before[f"{NAME}-wal"]), len(after[f"{NAME}-wal"])
    assert start < end
    olds = news = 0
    step = 1 if NIGHTLY else 31
    for length in (*range(start, end - 40, step), *range(end - 40, end + 1)):
        directory = in_memory / "cut"
        directory.mkdir(mode=0o700)
        (directory / NAME).write_bytes(after[NAME])
        (directory / f"{NAME}-wal").write_bytes(after[f"{NAME}-wal"][:length])
        read_back = read(directory)
        assert read_back in ((3, SMALL), (5, state)), length
        olds += read_back == (3, SMALL)
        news += read_back == (5, state)
        shutil.rmtree(directory)
    assert olds
    assert news == 1, "it counts with its last byte"


def _write_for_ever(directory: Path, told: int) -> None:
    """Write revision after revision, all keys anew in each; tell each that is written."""
    file = SnapshotFile.open(directory)
    known = None if file.manifest is None else file.manifest.streams.get(Stream.KEYS)
    revision = 0 if known is None else known.position.revision
    keys = [b"/%d" % number for number in range(30)]
    while True:
        revision += 1
        values = {key: entry(key, revision, b"%d" % revision * 300) for key in keys}
        if revision % 7 == 1:
            listing(file, revision, values)
        else:
            commit(file, revision, *values.values())
        os.write(told, b"%d\n" % revision)


def test_b85_killed_at_any_moment_all_is_there_that_was_written(in_memory: Path) -> None:
    rng = random.Random(1)
    last = 0
    for _ in range(200):
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _write_for_ever(in_memory / "state", writes)
            finally:
                os._exit(1)
        os.close(writes)
        with open(reads, "rb", buffering=0) as told:
            seen = b""
            # Killed while it writes: after so many revisions, and somewhat later.
            for _ in range(rng.randrange(3)):
                seen += told.read(20) or b""
            for _ in range(rng.randrange(20_000)):
                pass
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            seen += told.readall() or b""
        last = max([last, *map(int, seen.split())])
        read_back = read(in_memory / "state")
        if read_back is None:
            assert last == 0
            continue
        revision, state = read_back
        assert revision >= last, "what was written is there"
        last = revision
        assert len(state) == 30
        assert {value.value for value in state.values()} == {b"%d" % revision * 300}, "in one piece"
    assert last > 100
