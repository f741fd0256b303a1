"""stat(2), field by field."""

import stat

from etcdfs.files.write_buffer import WriteBuffer
from etcdfs.keyspace.attribute_records import Record
from etcdfs.keyspace.keys import Keyspace
from etcdfs.keyspace.store import KeyValue, Revision
from etcdfs.tree.bulk_load import load
from etcdfs.tree.inodes import NOT_IN_ETCD, Directory, File, StoredRecord
from etcdfs.tree.tree import Tree
from etcdfs.vfs.attributes import Defaults, mtime_of, size_of

DEFAULTS = Defaults(uid=7, gid=8, file_mode=0o666, dir_mode=0o777, umask=0o022)


def tree_of(*keys: bytes) -> Tree:
    tree = Tree(Keyspace(b"/"), lambda: 1000, complete=True)
    load(tree, (KeyValue(k, b"12345", Revision(2), Revision(2), 1) for k in sorted(keys)))
    return tree


def file_of(tree: Tree, name: bytes = b"f") -> File:
    found = tree.root.children[name]
    assert isinstance(found, File)
    return found


def test_file() -> None:
    found = DEFAULTS.of(file_of(tree_of(b"/f")), 60.0)
    assert found.mode == stat.S_IFREG | 0o644
    assert (found.nlink, found.uid, found.gid, found.size) == (1, 7, 8, 5)
    assert found.atime_ns == found.mtime_ns == found.ctime_ns == 1000
    assert found.timeout_s == 60.0


def test_directory() -> None:
    tree = tree_of(b"/d/a/x", b"/d/b/x", b"/d/f")
    directory = tree.root.children[b"d"]
    found = DEFAULTS.of(directory, 1.0)
    assert found.mode == stat.S_IFDIR | 0o755
    assert (found.nlink, found.size) == (4, 0)
    assert DEFAULTS.of(tree.root, 1.0).nlink == 3
    tree.detach(tree.root, b"d", gone=True)
    assert isinstance(directory, Directory)
    assert DEFAULTS.of(directory, 1.0).nlink == 0


def test_removed_file_has_no_link() -> None:
    tree = tree_of(b"/f")
    file = file_of(tree)
    tree.detach(tree.root, b"f", gone=True)
    assert DEFAULTS.of(file, 0.0).nlink == 0


def test_unpublished_bytes_count() -> None:
    file = file_of(tree_of(b"/f"))
    buffer = WriteBuffer(b"12345")
    buffer.write(0, b"6", append=True, now_ns=2000)
    file.buffer = buffer
    assert (size_of(file), mtime_of(file)) == (6, 2000)
    assert DEFAULTS.of(file, 0.0).ctime_ns == 2000


def test_file_that_is_not_in_etcd_yet() -> None:
    tree = tree_of()
    assert size_of(tree.new_file(None)) == 0


def test_attributes_of_its_own() -> None:
    file = file_of(tree_of(b"/f"))
    file.stored_record = StoredRecord(Record(mode=0o4600, uid=1, gid=2, atime_ns=3), NOT_IN_ETCD)
    found = DEFAULTS.of(file, 0.0)
    assert found.mode == stat.S_IFREG | 0o4600
    assert (found.uid, found.gid, found.atime_ns, found.mtime_ns) == (1, 2, 3, 1000)
