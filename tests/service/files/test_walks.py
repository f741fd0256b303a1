"""Which contents the kernel is given before it asks."""

from collections.abc import Sequence

import pytest

from etcdfs.files.walks import PORTION, PORTION_MAX, READS, Walks
from etcdfs.keyspace.attribute_records import Record
from etcdfs.keyspace.keys import Keyspace
from etcdfs.keyspace.store import KeyValue, Revision
from etcdfs.tree.bulk_load import load
from etcdfs.tree.inodes import File, Inode, StoredRecord
from etcdfs.tree.tree import Tree
from etcdfs.tree.value_cache import ValueCache

MANY = 1000


class Rig:
    """A directory whose files the kernel knows, and what it was given of them."""

    def __init__(self, count: int = MANY) -> None:
        self.tree = Tree(Keyspace(b"/"), lambda: 1, complete=True)
        self.value_cache = ValueCache(1 << 20)
        self.given: list[tuple[Inode, bytes]] = []
        self.portions: list[int] = []
        self.walks = Walks(self.tree, self.value_cache, self.take)
        for number in range(count):
            key, value = b"/f%04d" % number, b"value %d" % number
            load(self.tree, [KeyValue(key, value, Revision(1), Revision(1), 1)])
            self.value_cache.put(key, Revision(1), value)
        for file in self.files():
            self.tree.remember(file)

    def take(self, contents: Sequence[tuple[Inode, bytes]]) -> None:
        self.given += contents
        self.portions.append(len(contents))

    def files(self) -> list[File]:
        return [node for node in self.tree.root.children.values() if isinstance(node, File)]

    def read(self, count: int) -> list[File]:
        """Read files that the kernel has not been given, as many as there are, or `count`."""
        asked: list[File] = []
        for file in self.files():
            if len(asked) < count and not file.pages_pushed:
                self.walks.note(file)
                asked.append(file)
        return asked


def test_whoever_reads_a_few_files_is_given_the_others() -> None:
    rig = Rig()
    rig.read(READS - 1)
    assert not rig.given
    asked = rig.read(MANY)
    assert rig.portions[:3] == [PORTION, 2 * PORTION, 4 * PORTION]
    assert max(rig.portions) == PORTION_MAX
    assert len(asked) < 12
    assert len(rig.given) + READS - 1 + len(asked) == MANY
    values = {file.inode: b"value %d" % int(file.name[1:]) for file in rig.files()}
    assert all(values[inode] == value for inode, value in rig.given)
    assert len(dict(rig.given)) == len(rig.given), "once each"


def test_one_file_that_is_always_read_is_no_walk() -> None:
    rig = Rig()
    (file, *_) = rig.files()
    for _ in range(100):
        rig.walks.note(file)
    assert not rig.given


@pytest.mark.parametrize("what", ["unknown", "large", "not in memory", "another type", "undecided"])
def test_what_is_not_to_be_given(what: str) -> None:
    rig = Rig(READS + 1)
    (*_, file) = rig.files()
    assert file.key_state is not None
    match what:
        case "unknown":
            rig.tree.forget(file.inode, 1)
        case "large":
            file.key_state = file.key_state._replace(size=1 << 20)
        case "not in memory":
            rig.value_cache.discard(b"/" + file.name, Revision(1))
        case "another type":
            record = Record(type="fifo")
            file.stored_record = StoredRecord(record, file.key_state)
        case _:
            rig.tree.unseen.deciding.add(file.inode)
    rig.read(READS)
    assert not rig.given
    assert not file.pages_pushed
