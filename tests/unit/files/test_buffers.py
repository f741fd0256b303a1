"""Room for what is not published: a user's share, and all of it."""

import errno

import pytest

from etcdfs.errors import BufferFullError, BufferShareError
from etcdfs.files.write_buffer import SHARES, WriteBufferQuota
from etcdfs.tree.inodes import File, Inode

LIMIT = 400
SHARE = LIMIT // SHARES


def files(count: int) -> list[File]:
    return [File(Inode(number), None, 0) for number in range(count)]


def test_a_user_has_a_share() -> None:
    buffers = WriteBufferQuota(LIMIT, max_file_size=1)
    mine, other, anothers = files(3)
    buffers.take(mine, 1, SHARE - 1)
    with pytest.raises(BufferShareError) as caught:
        buffers.take(other, 1, 2)
    assert caught.value.errno == errno.EDQUOT
    buffers.take(anothers, 2, SHARE)
    buffers.take(other, 1, 1)
    with pytest.raises(BufferShareError):
        buffers.take(mine, 1, SHARE)
    assert buffers.statistics().size == 2 * SHARE
    assert buffers.statistics().refused == 2


def test_all_users_have_all_of_it() -> None:
    buffers = WriteBufferQuota(LIMIT, max_file_size=1)
    *full, last = files(SHARES + 1)
    for uid, file in enumerate(full):
        buffers.take(file, uid, SHARE)
    with pytest.raises(BufferFullError) as caught:
        buffers.take(last, SHARES, 1)
    assert caught.value.errno == errno.ENOSPC
    buffers.give_back(full[0])
    buffers.take(last, SHARES, 1)


def test_who_wrote_first_answers_for_a_file() -> None:
    buffers = WriteBufferQuota(LIMIT, max_file_size=1)
    shared, mine = files(2)
    buffers.take(shared, 1, 1)
    buffers.take(shared, 2, SHARE)
    buffers.take(mine, 2, SHARE)
    with pytest.raises(BufferShareError):
        buffers.take(shared, 2, SHARE + 1)


def test_what_becomes_smaller_or_ends_makes_room() -> None:
    buffers = WriteBufferQuota(LIMIT, max_file_size=1)
    first, second = files(2)
    buffers.take(first, 1, SHARE)
    buffers.take(first, 1, 10)
    buffers.take(second, 1, SHARE - 10)
    buffers.give_back(first)
    buffers.give_back(first)
    buffers.give_back(second)
    assert (buffers.statistics().files, buffers.statistics().size) == (0, 0)


def test_a_file_fits_however_little_room_there_is() -> None:
    buffers = WriteBufferQuota(1, max_file_size=100)
    (file,) = files(1)
    buffers.take(file, 1, 100)
