"""Extended attributes: the user's own, what etcd knows of a key, and what etcdfs says of itself.

Knows: which names there are, who may set them, and what they mean. Does not know: how the user's
own are kept (that is `set_attributes`), FUSE.

===========================  ====================================================================
`user.etcd.key`              the key
`user.etcd.create_revision`  \
`user.etcd.mod_revision`     } as etcd has them
`user.etcd.version`          /
`user.etcd.lease`            the lease's number, in hexadecimal as etcdctl writes it
`user.etcd.ttl`              seconds that are left of it; can be set, and removed
`user.etcdfs.statistics`     of the root: the status of the mount, as JSON (`etcdfs.daemon.status`)
`user.etcdfs.wait.REVISION`  of the root: answers once readers see that revision
===========================  ====================================================================

None of these is listed: cp, rsync and tar copy what they find in the list, and would try to set
the revisions of one key on another.

Concurrency: trio thread.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, final

import trio

from etcdfs.admission import about_to_wait
from etcdfs.errors import (
    InvalidRequestError,
    NotPermittedError,
    NotSupportedError,
    ReadOnlyError,
    RevisionNotReachedError,
)
from etcdfs.tree.inodes import Directory, File, Node
from etcdfs.tree.node_attributes import key_state_of_node
from etcdfs.tree.tree import Tree
from etcdfs.tree.view import View
from etcdfs.vfs.attributes import Caller
from etcdfs.vfs.leases import Leases, lease_of
from etcdfs.vfs.namei import node_of
from etcdfs.vfs.setattr import Setattr, no_attribute, there_already

USER: Final = b"user."
ETCD: Final = b"user.etcd."
TTL: Final = b"user.etcd.ttl"
ETCDFS: Final = b"user.etcdfs."
STATISTICS: Final = b"user.etcdfs.statistics"
WAIT: Final = b"user.etcdfs.wait."

TTL_MAX: Final = 9_000_000_000
"""The longest lease, in seconds (etcd: server/lease/lessor.go, MaxLeaseTTL)."""


@final
class Xattrs:
    """The calls on extended attributes, as they bear the names of the system calls."""

    def __init__(
        self,
        view: View,
        leases: Leases,
        set_attributes: Setattr,
        *,
        timeout_s: float,
        read_only: bool,
        statistics: Callable[[], Mapping[str, Any]],
        statistics_owner: int | None,
    ) -> None:
        """Answer for a mount.

        Only `statistics_owner` and root may read the statistics; everybody if it is None.
        """
        # --- dependencies
        self._view = view
        self._setattr = set_attributes
        self._leases = leases
        self._statistics = statistics
        # --- constants
        self._timeout_s = timeout_s
        self._read_only = read_only
        self._statistics_owner = statistics_owner

    @property
    def _tree(self) -> Tree:
        return self._view.update.tree

    async def getxattr(self, inode: int, name: bytes, caller: Caller | None = None) -> bytes:
        """Return an extended attribute to a caller; None is the mount itself.

        Raises:
            NotPermittedError: It is not for the caller.
            NoAttributeError: There is none of that name.
            NotSupportedError: Only user.* attributes can be kept.
            RevisionNotReachedError: The revision to wait for did not come within `--timeout`.
            BusyError: Too many wait.
        """
        _check_name(name)  # first: the kernel asks for security.capability before each write
        if name.startswith(ETCDFS):
            return await self._own(self._tree.node(inode), name, caller)
        node = await node_of(self._view, inode)
        if name.startswith(ETCD):
            return await self._fact(node, name)
        value = self._setattr.xattrs(node).get(name)
        if value is None:
            raise no_attribute(name)
        return value

    async def listxattr(self, inode: int) -> tuple[bytes, ...]:
        """Return the names of the user's own attributes."""
        node = await node_of(self._view, inode)
        return tuple(sorted(self._setattr.xattrs(node)))

    async def setxattr(
        self,
        inode: int,
        name: bytes,
        value: bytes,
        is_there: bool | None = None,
        caller: Caller | None = None,
    ) -> None:
        """Set an attribute, on condition that there is one of that name or is none.

        Args:
            inode: Of what.
            name: Its name.
            value: Its value.
            is_there: True for XATTR_REPLACE, False for XATTR_CREATE, None for either.
            caller: Who makes the call; None for the mount itself.

        Raises:
            ExistsError: XATTR_CREATE, and there is one.
            NoAttributeError: XATTR_REPLACE, and there is none.
            NotPermittedError: It says something that cannot be set.
            NotSupportedError: Only user.* attributes can be kept.
            AttributesFullError: It does not fit.
        """
        node = self._writable(inode, name)
        if name != TTL:
            await self._setattr.set_xattr(node, name, value, is_there=is_there)
            return
        file = await self._expiring(node, name, caller)
        if is_there is not None and is_there != await self._expires(file):
            raise no_attribute(name) if is_there else there_already(name)
        await self._leases.attach(file, _seconds(value))

    async def removexattr(self, inode: int, name: bytes, caller: Caller | None = None) -> None:
        """Remove an attribute.

        Raises:
            NoAttributeError: There is none of that name.
            NotPermittedError: It says something that cannot be removed.
        """
        node = self._writable(inode, name)
        if name != TTL:
            await self._setattr.remove_xattr(node, name)
        elif not await self._leases.detach(await self._expiring(node, name, caller)):
            raise no_attribute(name)

    # --- what etcd and etcdfs say -----------------------------------------------------------

    async def _own(self, node: Node, name: bytes, caller: Caller | None) -> bytes:
        wanted = name.removeprefix(WAIT)
        if node is not self._tree.root or (name != STATISTICS and not wanted.isdigit()):
            raise no_attribute(name)
        if name == STATISTICS:
            owner = self._statistics_owner
            if owner is not None and caller is not None and caller.uid not in (0, owner):
                msg = f"{name!r} is for whoever mounted, and for root"
                raise NotPermittedError(msg)
            return json.dumps(self._statistics(), sort_keys=True).encode()
        about_to_wait()
        with trio.move_on_after(self._timeout_s):
            await self._view.reached(int(wanted))
            return wanted
        msg = f"revision {int(wanted)} was not reached within {self._timeout_s} s"
        raise RevisionNotReachedError(msg)

    async def _fact(self, node: Node, name: bytes) -> bytes:
        key_state = key_state_of_node(node)
        if key_state is None or not self._tree.is_attached(node):
            raise no_attribute(name)
        if name == TTL:
            ttl_s = await self._leases.time_left(key_state.lease)
            if ttl_s is None:
                raise no_attribute(name)
            return b"%d" % ttl_s
        known = {
            b"key": self._tree.own_key(node),
            b"create_revision": b"%d" % key_state.create_revision,
            b"mod_revision": b"%d" % key_state.mod_revision,
            b"version": b"%d" % key_state.version,
            b"lease": b"%016x" % key_state.lease if key_state.lease else None,
        }
        found = known.get(name.removeprefix(ETCD))
        if found is None:
            raise no_attribute(name)
        return found

    # --- helpers ----------------------------------------------------------------------------

    def _writable(self, inode: int, name: bytes) -> Node:
        _check_name(name)
        node = self._tree.node(inode)
        if not (isinstance(node, File) and node.handles):
            node = self._tree.current(node)
        if self._read_only:
            msg = "the mount is read-only"
            raise ReadOnlyError(msg)
        if name != TTL and name.startswith((ETCD, ETCDFS)):
            msg = f"{name!r} can only be read"
            raise NotPermittedError(msg)
        return node

    async def _expires(self, file: File) -> bool:
        return await self._leases.time_left(lease_of(file)) is not None

    async def _expiring(self, node: Node, name: bytes, caller: Caller | None) -> File:
        """Return the file that a caller may let expire, or last.

        The kernel has looked whether he may write to it; but to let it expire is to delete it.
        """
        if isinstance(node, Directory):
            msg = f"{name!r} is for files: what is in a directory does not go with its marker"
            raise NotPermittedError(msg)
        await self._view.revalidate_node(node)
        if caller is not None and caller.uid not in (0, self._setattr.owner(node)):
            msg = f"{name!r} is for the owner of inode {node.inode}"
            raise NotPermittedError(msg)
        return node


def _seconds(value: bytes) -> int:
    """Return the seconds that somebody wants a file to last.

    Raises:
        InvalidRequestError: It is no number of them, or more than etcd takes.
    """
    text = value.strip()
    digits = text.lstrip(b"0")
    if not text.isdigit() or not digits or len(digits) > len(str(TTL_MAX)) or int(digits) > TTL_MAX:
        msg = f"{value[:40]!r} is no number of seconds"
        raise InvalidRequestError(msg)
    return int(digits)


def _check_name(name: bytes) -> None:
    if not name.startswith(USER):
        msg = f"{name!r} is not in the name space user.*"
        raise NotSupportedError(msg)
