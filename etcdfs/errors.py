"""Every way an operation can fail, each with the errno or exit code its caller sees.

Knows: the whole table of errors. Does not know: who raises them.

Families, named by whose fault it is:

* `CallerError`: the program that made the system call asked for something that cannot be.
* `StoreError`: etcd refused, or could not be asked.
* `SnapshotError`: the disk that a snapshot is kept on.
* `CommandError`: the person at the command line; carries an exit code instead of an errno.

An exception outside these families is our own fault (EIO and a traceback at the border).

Concurrency: none; exceptions only.
"""

import errno
import logging
from typing import ClassVar


class EtcdfsError(Exception):
    """Base of every error that is raised on purpose.

    Attributes:
        errno: What the system call returns.
        level: The level at which the FUSE border logs it.
    """

    errno: ClassVar[int] = errno.EIO
    level: ClassVar[int] = logging.WARNING


# --- the caller's fault ---------------------------------------------------------------------


class CallerError(EtcdfsError):
    """The request itself cannot be granted; nothing is wrong with us or with etcd."""

    errno = errno.EINVAL
    level = logging.DEBUG


class NotFoundError(CallerError):
    """No such file or directory."""

    errno = errno.ENOENT


class ExistsError(CallerError):
    """The name is taken."""

    errno = errno.EEXIST


class NotADirectoryFileError(CallerError):
    """A directory was needed and the path names a file."""

    errno = errno.ENOTDIR


class IsADirectoryFileError(CallerError):
    """A file was needed and the path names a directory."""

    errno = errno.EISDIR


class NotEmptyError(CallerError):
    """The directory still has entries."""

    errno = errno.ENOTEMPTY


class NameTooLongError(CallerError):
    """A name has more than 255 bytes, or its key more than etcd takes."""

    errno = errno.ENAMETOOLONG


class NameReservedError(CallerError):
    """The name belongs to etcdfs, or is an escape that stands for no key."""

    errno = errno.EPERM


class FileTooLargeError(CallerError):
    """The value would be larger than etcd or `--max-file-size` allows."""

    errno = errno.EFBIG


class BufferShareError(CallerError):
    """The user has written too much that is not written back yet (`--write-buffer`)."""

    errno = errno.EDQUOT


class BufferFullError(CallerError):
    """All users together have written too much that is not written back yet."""

    errno = errno.ENOSPC


class ReadOnlyError(CallerError):
    """The mount is read-only."""

    errno = errno.EROFS


class NotSupportedError(CallerError):
    """It has no meaning here: attributes but `user.*`, or any of them with `--no-attrs`."""

    errno = errno.ENOTSUP


class NotPermittedError(CallerError):
    """The operation is refused whoever asks (EPERM of link(2) and mknod(2))."""

    errno = errno.EPERM


class NoAttributeError(CallerError):
    """There is no extended attribute of that name."""

    errno = errno.ENODATA


class AttributesFullError(CallerError):
    """No more extended attributes fit beside those that are there (setxattr(2): ENOSPC)."""

    errno = errno.ENOSPC


class InvalidRequestError(CallerError):
    """The arguments make no sense together."""

    errno = errno.EINVAL


class CrossDirectoryError(CallerError):
    """The rename cannot be done as one transaction; `mv` copies instead."""

    errno = errno.EXDEV


class BadHandleError(CallerError):
    """The file handle is not open for this."""

    errno = errno.EBADF


class StaleError(CallerError):
    """The inode stands for a version that is no longer at any path.

    ESTALE, not ENOENT: it makes the kernel look the path up again
    (Documentation/filesystems/path-lookup.rst, LOOKUP_REVAL).
    """

    errno = errno.ESTALE


class WriteConflictError(CallerError):
    """Another client changed the key under a partial overwrite; its value stays."""

    errno = errno.ESTALE


# --- etcd's fault ---------------------------------------------------------------------------


class StoreError(EtcdfsError):
    """Etcd refused the request or could not be asked. Nothing was changed unless said."""


class StoreUnavailableError(StoreError):
    """No endpoint could be reached; the request was not executed."""


class StoreTimeoutError(StoreError):
    """A read got no answer within `--timeout`; nothing was changed."""

    errno = errno.ETIMEDOUT


class RevisionNotReachedError(StoreTimeoutError):
    """Somebody waited for a revision, and it did not come within `--timeout`."""

    level = logging.DEBUG  # anybody may ask for one that is far away


class OutcomeUnknownError(StoreError):
    """A write got no answer: it may or may not have been applied, now or soon.

    It must never be sent again as it is; read back what became of it.
    """

    errno = errno.ETIMEDOUT


class StorePermissionError(StoreError):
    """etcd's roles do not allow it.

    Attributes:
        is_of_role: Whether it says anything of what the user may do. What depends on that must
            not be decided by a password that has just been changed.
    """

    errno = errno.EACCES
    is_of_role: ClassVar[bool] = True


class StoreUserError(StorePermissionError):
    """etcd wants a user and was given none, or one that it does not know (any more)."""

    is_of_role = False


class StoreLoginError(StorePermissionError):
    """etcd does not accept the user or the password, or the password cannot be read."""

    is_of_role = False


class StoreTlsError(StoreUnavailableError):
    """No connection that both sides trust could be made; nothing was sent."""


class MirrorStaleError(StoreError):
    """etcd has not been heard for so long that what is known must not be shown any more."""

    level = logging.DEBUG  # said once, when it begins


class MirrorDeniedError(StorePermissionError):
    """etcd no longer lets this mount read what it knows, so it must not be shown any more."""

    level = logging.DEBUG  # said once, when it begins
    is_of_role = False


class BusyError(StoreError):
    """Too many requests wait, or too many of this user's; nothing was done for this one."""

    errno = errno.EAGAIN
    level = logging.DEBUG  # whoever makes so many should not fill the log with them


class StoreFullError(StoreError):
    """etcd's NOSPACE alarm is on, or its quota is used up."""

    errno = errno.ENOSPC


class StoreValueTooLargeError(StoreError):
    """The request is larger than etcd's --max-request-bytes."""

    errno = errno.EFBIG


class AnswerTooLargeError(StoreError):
    """What etcd answers is larger than this mount takes at a time; ask for less."""

    errno = errno.EFBIG


class TooManyOperationsError(StoreError):
    """The transaction has more operations than etcd's --max-txn-ops."""

    errno = errno.E2BIG


class TransactionAbortedError(StoreError):
    """A condition inside the transaction did not hold, and it was given up as a whole."""


class LeaseExistsError(StoreError):
    """There is a lease of that number already."""


class CompactedError(StoreError):
    """The revision asked for has been compacted away.

    Attributes:
        compact_revision: The oldest revision etcd still has; 0 when it did not say.
    """

    def __init__(self, message: str, compact_revision: int = 0) -> None:
        super().__init__(message)
        self.compact_revision = compact_revision


class FutureRevisionError(StoreError):
    """The revision asked for lies in the future: this is another history."""


class WatchLostError(StoreError):
    """The watch ended, for whatever reason but compaction; resume it."""


class StoreProtocolError(StoreError):
    """etcd answered something that its API does not allow."""


# --- the snapshot's fault -------------------------------------------------------------------


class SnapshotError(EtcdfsError):
    """The disk of `--state-dir` does not do its part. No system call ever sees it."""


class SnapshotDamagedError(SnapshotError):
    """The snapshot of the mirror is not what was written, or not of this etcdfs."""


class SnapshotWriteError(SnapshotError):
    """The snapshot of the mirror could not be written; what there was of it is still there."""


# --- the person at the command line ---------------------------------------------------------


class CommandError(EtcdfsError):
    """A command cannot be carried out; the message is one line for a person.

    Attributes:
        exit_code: The exit status of the command (docs/reference.md).
    """

    exit_code: ClassVar[int] = 1


class UsageError(CommandError):
    """The command line makes no sense."""

    exit_code = 2


class MountpointMissingError(CommandError):
    """The mountpoint does not exist, or cannot be reached."""

    exit_code = 10


class MountpointNotADirectoryError(CommandError):
    """The mountpoint is not a directory."""

    exit_code = 11


class MountpointNotEmptyError(CommandError):
    """The mountpoint has files in it that the mount would hide."""

    exit_code = 12


class AlreadyMountedError(CommandError):
    """Something is mounted there already, or is about to be."""

    exit_code = 13


class NotMountedError(CommandError):
    """`umount`: no etcdfs is mounted there."""

    exit_code = 14


class UnmountError(CommandError):
    """`umount`: busy, not permitted, or the daemon did not end within `--timeout`."""

    exit_code = 15


class NotAnsweringError(CommandError):
    """A mount does not say how it is: its daemon is gone or hangs, or it is not for this user."""

    exit_code = 16


class EtcdUnreachableError(CommandError):
    """No endpoint answered in time."""

    exit_code = 20


class EtcdRefusedError(CommandError):
    """etcd answered, and refused."""

    exit_code = 21


class EndpointError(CommandError):
    """An endpoint cannot be understood."""

    exit_code = 22


class TlsError(CommandError):
    """TLS was asked for and cannot be had: a file is of no use, or one side does not trust."""

    exit_code = 23


class LoginError(CommandError):
    """etcd does not accept the user or the password, or there is no password."""

    exit_code = 24


class PrefixError(CommandError):
    """The key prefix cannot be mounted."""

    exit_code = 30


class FuseMissingError(CommandError):
    """There is no /dev/fuse, or no fusermount3."""

    exit_code = 40


class FuseRefusedError(CommandError):
    """The kernel or fusermount3 refused the mount."""

    exit_code = 41


class EmbeddedMissingError(CommandError):
    """--embedded found no etcd binary."""

    exit_code = 50


class EmbeddedFailedError(CommandError):
    """The embedded etcd did not start, or its data directory cannot be used."""

    exit_code = 51


class MetricsAddressError(CommandError):
    """Nobody can listen on the address of --metrics-listen."""

    exit_code = 62


class ProblemsFoundError(CommandError):
    """`doctor` found a problem."""

    exit_code = 70


class UnpublishedError(CommandError):
    """The daemon ended, but etcd did not take all that was written; the log names what is lost."""

    exit_code = 60


class InstallError(CommandError):
    """What the system looks for in its own directories cannot be put there."""

    exit_code = 61


class StateDirectoryError(CommandError):
    """The directory of `--state-dir` cannot be used."""

    exit_code = 63
