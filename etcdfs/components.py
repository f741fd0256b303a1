"""The parts of a mount between the store and the doors to the kernel, and how they are put together.

Knows: who depends on whom. Does not know: pyfuse3 and gRPC, in which order things start and end.
So the tests have their parts from here, too, between a store and a kernel that are fakes.

Concurrency: none of its own.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from etcdfs.consistency.snapshot import NO_SNAPSHOT, Snapshot
from etcdfs.consistency.staleness import Liveness
from etcdfs.consistency.times_record import TimesRecord
from etcdfs.files.handles import Handles
from etcdfs.files.write_buffer import WriteBufferQuota
from etcdfs.files.writeback import Writeback
from etcdfs.keyspace.keys import Keyspace
from etcdfs.keyspace.outcomes import ResolvingStore
from etcdfs.keyspace.store import Clock, Store
from etcdfs.mirror.invalidator import KernelCache
from etcdfs.mirror.mirror import Mirror
from etcdfs.options import MountOptions
from etcdfs.tree.tree import Tree
from etcdfs.tree.value_cache import ValueCache
from etcdfs.uncached.uncached import Uncached
from etcdfs.vfs.attributes import Defaults
from etcdfs.vfs.filesystem import Filesystem


class Components:
    """One mount's parts."""

    def __init__(
        self,
        options: MountOptions,
        store: Store,
        kernel: KernelCache,
        *,
        statistics: Callable[[], Mapping[str, Any]],
        snapshot: Snapshot = NO_SNAPSHOT,
        clock: Clock = time.time_ns,
        monotonic: Clock = time.monotonic_ns,
    ) -> None:
        """Put them together; nothing runs yet.

        Args:
            options: What is mounted, and how.
            store: Where the keys are.
            kernel: What the kernel has cached.
            statistics: What whoever asks for the state of the mount is shown.
            snapshot: Where the state is kept between mounts.
            clock: Nanoseconds since 1970.
            monotonic: Nanoseconds that nobody sets.
        """
        self.options = options
        self.store = store
        may_keep = not (options.read_only or options.no_attrs)
        self.tree = Tree(
            Keyspace(options.prefix),
            clock,
            monotonic=monotonic,
            complete=options.cache,
            attributes=not options.no_attrs,
        )
        self.value_cache = ValueCache(options.cache_size)
        self.mirror: Mirror | None = None
        if options.cache:
            self.mirror = Mirror(
                store,
                self.value_cache,
                self.tree,
                kernel,
                settle_timeout_s=options.settle_timeout_s,
                timeout_s=options.timeout_s,
                watch_timeout_s=options.watch_timeout_s,
                max_stale_s=options.max_stale_s,
                audit_interval_s=options.audit_interval_s,
                linearizable=options.linearizable,
                tidies=may_keep,
                snapshot=snapshot,
            )
        self.view = self.mirror or Uncached(store, self.value_cache, self.tree)
        self.times = TimesRecord(
            store, self.tree.revisions, clock, writes=options.cache and may_keep
        )
        self.writeback = Writeback(
            store, self.view, self.value_cache, max_file_size=options.max_file_size
        )
        self.buffers = WriteBufferQuota(options.write_buffer, max_file_size=options.max_file_size)
        self.files = Handles(
            self.view, self.value_cache, self.writeback, self.buffers, read_only=options.read_only
        )
        self.filesystem = Filesystem(
            ResolvingStore(store),
            self.view,
            self.files,
            Defaults(
                uid=options.uid,
                gid=options.gid,
                file_mode=options.file_mode,
                dir_mode=options.dir_mode,
                umask=options.umask,
                rights=self.tree.rights,
            ),
            Liveness(store),
            kernel_timeout_s=options.kernel_lifetime_s,
            timeout_s=options.timeout_s,
            read_only=options.read_only,
            statistics=statistics,
            statistics_owner=os.geteuid() if options.allow_other else None,
        )
