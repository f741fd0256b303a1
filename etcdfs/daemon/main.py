"""The composition root: puts the parts together, mounts, serves, and takes all down again.

Knows: who depends on whom, and in which order things start and end. Does not know: anything that
one of the parts knows.

Run as `python -m etcdfs.daemon.main MOUNTPOINT --options-fd N [--status-fd M]` by the command line.

Order at the start: etcd (embedded or not), the first listing, the kernel mount, the report that
all is ready. At the end (unmounted from outside, SIGTERM, SIGINT or SIGHUP): what was written is
published, the mount is taken away, then etcd. After a crash nothing is unmounted: an rsync that
finds an empty directory deletes its mirror. So libfuse's `auto_unmount` is not for us.

Concurrency: one trio loop; the kernel door has a thread of its own.
"""

import argparse
import faulthandler
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, NoReturn, final

import trio

from etcdfs.components import Components
from etcdfs.consistency.snapshot import NO_SNAPSHOT
from etcdfs.daemon.embedded_etcd import default_data_dir, describe, open_embedded
from etcdfs.daemon.first_state import Filling, Patience, store_errors
from etcdfs.daemon.kernel_threads import (
    InotifyEvents,
    UnseenOpens,
    close_threads,
    leave_kernel,
    may_look,
)
from etcdfs.daemon.metrics_server import serving_metrics
from etcdfs.daemon.signals import ServiceManager, Serving, Signals, find_service_manager
from etcdfs.daemon.status import Section, Status
from etcdfs.errors import (
    CommandError,
    EtcdUnreachableError,
    StoreError,
    UnpublishedError,
)
from etcdfs.etcd.client import EtcdStore, open_store
from etcdfs.fuse.control_directory import ControlDirectory
from etcdfs.fuse.fastpath import fast_path_of
from etcdfs.fuse.notify import KernelCache, is_in_kernel
from etcdfs.fuse.operations import FuseMount, Operations
from etcdfs.fuse.procfs import describe_shortage, is_shortage
from etcdfs.keyspace.keys import Keyspace
from etcdfs.keyspace.store import END_OF_KEYS, Store, range_end
from etcdfs.mirror.mirror import watch_over
from etcdfs.options import Endpoint, MountOptions
from etcdfs.process.logs import keep_out_of, setup_logging
from etcdfs.process.memory import keep_heap_small
from etcdfs.process.mountpoint import (
    SUBTYPE,
    Claim,
    Mounted,
    can_forbid_links,
    claimed,
    find_mounted,
    forbid_links,
    is_there,
)
from etcdfs.process.processes import take_name
from etcdfs.process.startup_protocol import (
    Failed,
    Ready,
    Reporter,
    open_reporter,
    read_options,
)
from etcdfs.snapshots.snapshots import Snapshots, open_snapshots

log = logging.getLogger(__name__)

_STDERR: Final = 2
_NOSYMFOLLOW: Final = "nosymfollow"
DEFAULT_PREFIX: Final = b"/"

SOURCE_MAX: Final = 1000
"""Characters of what mount(8) shows as the source; Linux takes a page at most."""

LOST_SHOWN: Final = 5
"""Names in the one line that says what was lost; the log has them all."""

FLUSH_TIMEOUTS: Final = 2
"""Times `--timeout` that write buffers may take to be published when the mount is taken down."""


@final
class ServedComponents(Components):
    """The parts of a mount, and its doors to the kernel and to whoever watches over it."""

    def __init__(
        self, options: MountOptions, store: Store, snapshots: Snapshots | None = None
    ) -> None:
        """Put everything together; nothing runs yet."""
        self.kernel = KernelCache()
        super().__init__(
            options,
            store,
            self.kernel,
            statistics=lambda: self.status.document(),  # noqa: PLW0108 -- it is yet to come
            snapshot=NO_SNAPSHOT if snapshots is None else snapshots,
        )
        self.snapshots = snapshots
        self.unreachable: EtcdUnreachableError | None = None  # since the start
        self.outside: bytes | None = None  # a key that no default mount shows
        self.status = Status(options, self._sections())
        self.operations = Operations(
            self.filesystem,
            self.files,
            self.filesystem.xattrs,
            store=self.kernel.store if options.cache else None,
            fast_path=fast_path_of(options, may_look=may_look()),
            unopened=None if self.mirror is None else self.mirror.unopened,
            control=None
            if options.no_control_dir
            else ControlDirectory(
                self.status.files(), owner=os.geteuid(), is_private=options.allow_other
            ),
        )
        self.inotify = InotifyEvents(options, self.tree, self.mirror, self.filesystem)
        self.unseen_opens = UnseenOpens(
            self.tree,
            self.mirror,
            self.value_cache,
            self.filesystem,
            self.kernel,
            self.operations,
        )

    def _sections(self) -> dict[str, Section]:
        """Return who is asked for each section of the status document."""
        sections: dict[str, Section] = {
            "requests": lambda: dict(self.operations.requests),  # these are yet to come
            "admission": lambda: self.operations.admission.statistics(),  # noqa: PLW0108
            "fast_path": lambda: [feature.name for feature in self.operations.fast_path.features],
            "inotify": lambda: self.inotify.statistics(),  # noqa: PLW0108
            "open_files": lambda: len(self.files),
            "store": self.store.statistics,
            "tree": self.tree.statistics,
            "attributes": self.tree.rights.statistics,
            "value_cache": self.value_cache.statistics,
            "kernel": self.kernel.statistics,
            "writeback": self.writeback.statistics,
            "write_buffer": self.buffers.statistics,
            "key_outside": lambda: None if self.outside is None else repr(self.outside)[2:-1],
        }
        mirror = self.mirror
        if mirror is not None:
            sections["mirror"] = mirror.statistics
            sections["unopened"] = mirror.unopened.statistics
            sections["staleness"] = mirror.staleness.statistics
            sections["audit"] = mirror.auditor.statistics
            sections["state_machine"] = lambda: mirror.state_machine.statistics()  # noqa: PLW0108
            if mirror.stored_records is not None:
                sections["attribute_audit"] = mirror.stored_records.auditor.statistics
        if self.snapshots is not None:
            sections["snapshot"] = self.snapshots.statistics
        return sections

    async def load_times(self) -> None:
        """Learn when revisions were made, if that is kept."""
        if not self.options.no_attrs:
            await self.times.load()

    async def look_elsewhere(self) -> None:
        """See whether there are keys that the default prefix leaves out, and say so once."""
        if self.options.prefix != DEFAULT_PREFIX:
            return
        outside = ((b"\0", DEFAULT_PREFIX), (range_end(DEFAULT_PREFIX), END_OF_KEYS))
        try:
            pages = [
                await self.store.range(start, end, limit=1, keys_only=True)
                for start, end in outside
            ]
        except StoreError as exc:  # who may not see them need not know
            log.debug("keys without a leading slash are not looked for: %s", exc)
            return
        self.outside = next((entry.key for page in pages for entry in page.entries), None)
        if self.outside is not None:
            log.info(
                "there are keys that do not begin with a slash, such as %r: --prefix '' shows them",
                self.outside,
            )

    async def flush(self) -> None:
        """Publish what is still unpublished, as far as that can be done in time."""
        with trio.move_on_after(FLUSH_TIMEOUTS * self.options.timeout_s):
            for file, error in await self.files.flush_all():
                log.info("inode %d could not be published: %s", file.inode, error)

    def check_published(self) -> None:
        """Make sure, when nothing can be written any more, that all of it is in etcd.

        Raises:
            UnpublishedError: Something is not, and lost; the log names it.
        """
        lost = [key.decode(errors="backslashreplace") for key in self.files.unpublished()]
        for key in lost:
            log.error("what was written to %s and not yet closed is lost", key)
        if lost:
            shown = ", ".join(lost[:LOST_SHOWN]) + (", ..." if len(lost) > LOST_SHOWN else "")
            raise UnpublishedError(f"etcd did not take what was written to {shown}: it is lost")


async def serve(
    options: MountOptions, reporter: Reporter, manager: ServiceManager, claim: Claim
) -> None:
    """Mount, serve until unmounted or told to end, and clean up.

    Args:
        options: What is to be mounted, and how.
        reporter: Who is told how the start goes.
        manager: Who is told how it goes on.
        claim: To the mountpoint; released once it is mounted.

    Raises:
        CommandError: It could not be mounted; nothing was left behind.
    """
    async with trio.open_nursery() as nursery:
        signals = Signals(manager, nursery.cancel_scope.cancel)
        await nursery.start(signals.run)
        async with AsyncExitStack() as stack:
            patience = Patience(options.wait_for_etcd_s, reporter)
            components, store, client_url = await _open_components(stack, options, patience)
            logging.getLogger().addHandler(components.status.problems)
            tasks = await stack.enter_async_context(trio.open_nursery())
            stack.callback(tasks.cancel_scope.cancel)
            if not options.no_attrs:
                stack.push_async_callback(components.times.save)
            await _start(stack, tasks, components, patience, reporter)
            if options.metrics_listen is not None:
                pages = components.status.pages()
                await stack.enter_async_context(serving_metrics(options.metrics_listen, pages))
            await trio.to_thread.run_sync(claim.check)
            mount = FuseMount(components.operations, options.mountpoint, _kernel_options(options))
            with mount:
                mounted = _found_by_name(options.mountpoint)
                components.operations.openers.device = None if mounted is None else mounted.device
                claim.release()
                if _forbids_links(options):
                    forbid_links(options.mountpoint)
                components.kernel.start(tasks)
                components.unseen_opens.start(tasks, mounted)
                note = components.inotify.start(tasks, mounted, components.operations)
                go_on = partial(tasks.start_soon, manager.run, components.status.line)
                tasks.start_soon(_announce, components, reporter, client_url, note, go_on)
                signals.serving = Serving(
                    statistics=components.status.document,
                    reread=store.renew,
                    end=partial(_end_serving, components, mount),
                )
                await mount.run()
                await components.flush()
                await leave_kernel(components.kernel, components.inotify, mount, mounted)
                mount.unmounts = mounted is not None and is_there(mounted)
            components.unseen_opens.close()
            log.info("unmounted %s", options.mountpoint, extra={"event": "unmounted"})
            components.check_published()
        nursery.cancel_scope.cancel()


async def _end_serving(components: ServedComponents, mount: FuseMount) -> None:
    await components.flush()
    # While requests are answered: they hold locks.
    await close_threads(components.kernel, components.inotify)
    mount.stop()


async def _start(
    stack: AsyncExitStack,
    tasks: trio.Nursery,
    components: ServedComponents,
    patience: Patience,
    reporter: Reporter,
) -> None:
    """Return once there is something to be shown."""
    mirror, snapshots = components.mirror, components.snapshots
    if mirror is None:
        await components.load_times()
        await components.look_elsewhere()
        return
    if snapshots is not None:
        tasks.start_soon(snapshots.run, mirror)
        stack.push_async_callback(snapshots.aclose, mirror)
    filling = Filling(
        tasks,
        components.store,
        mirror,
        snapshots,
        reporter,
        timeout_s=components.options.timeout_s,
    )
    try:
        if components.unreachable is not None:
            raise components.unreachable
        await components.load_times()
        await patience.until_done(filling.from_etcd)
    except EtcdUnreachableError as exc:
        if not components.options.offline_start:
            raise
        components.unreachable = exc
        await filling.from_snapshot(exc)
    tasks.start_soon(watch_over, mirror)
    if components.unreachable is not None:
        tasks.start_soon(_go_live, components, filling)
        return
    await components.times.save()
    await components.look_elsewhere()
    tasks.start_soon(components.times.run)


async def _go_live(components: ServedComponents, filling: Filling) -> None:
    """Do what a start without etcd has left out, once it answers."""
    await filling.until_live()
    components.unreachable = None
    await components.load_times()
    await components.times.save()
    await components.look_elsewhere()
    await components.times.run()


def _found_by_name(mountpoint: str) -> Mounted | None:
    """Return what was just mounted; whoever looks for who serves it finds this process now."""
    mounted = find_mounted(mountpoint)
    if mounted is not None:
        take_name(mounted.device)
        keep_out_of(os.makedev(*map(int, mounted.device.split(":"))))
    return mounted


async def _open_components(
    stack: AsyncExitStack, options: MountOptions, patience: Patience
) -> tuple[ServedComponents, EtcdStore, str | None]:
    snapshots = open_snapshots(options, time.time_ns)
    endpoints: tuple[Endpoint, ...] = options.endpoints
    client_url = None
    if options.embedded:
        directory = default_data_dir() if options.data_dir is None else Path(options.data_dir)
        embedded = await stack.enter_async_context(open_embedded(directory))
        endpoints, client_url = (embedded,), str(embedded)

    async def connect(*, reachable: bool = True) -> EtcdStore:
        with store_errors():
            opening = open_store(
                endpoints,
                timeout_s=options.timeout_s,
                security=options.security,
                reachable=reachable,
            )
            store = await stack.enter_async_context(opening)
            if not options.cache:  # a listing comes next, else
                await _check_readable(store, Keyspace(options.prefix))
            return store

    unreachable: EtcdUnreachableError | None = None
    try:
        store = await patience.until_done(connect)
    except EtcdUnreachableError as exc:
        if not options.offline_start:
            raise
        unreachable = exc
        store = await connect(reachable=False)
    connected = replace(options, endpoints=endpoints)  # also to an embedded etcd
    components = ServedComponents(connected, store, snapshots)
    components.unreachable = unreachable
    return components, store, client_url


async def _check_readable(store: Store, keyspace: Keyspace) -> None:
    """Ask for what the mount is about: who may read nothing of it should hear so at once.

    Raises:
        StoreError: It may not be read, or etcd does not answer.
    """
    await store.range(keyspace.start, keyspace.end, limit=1, keys_only=True)


async def _announce(
    components: ServedComponents,
    reporter: Reporter,
    client_url: str | None,
    note: str,
    then: Callable[[], None],
) -> None:
    """Say that the mount is usable, once a call through the kernel has shown it.

    Args:
        components: Those of the mount.
        reporter: Who is told.
        note: What a person should know besides.
        client_url: Where the embedded etcd listens; None without one.
        then: Called after that.
    """
    mountpoint = components.options.mountpoint
    with trio.fail_after(components.options.timeout_s):
        await trio.to_thread.run_sync(os.stat, mountpoint, abandon_on_cancel=True)
    log.info("mounted %s", mountpoint, extra={"event": "mounted"})
    mirror, etcd = components.mirror, ""
    if client_url is not None:
        etcd = describe((await components.store.status()).version)
        log.info("%s", etcd)
    reporter.report(
        Ready(
            revision=0 if mirror is None else mirror.revision,
            keys=0 if mirror is None else mirror.statistics().listed_keys,
            client_url=client_url,
            etcd=etcd,
            note=note,
            offline="" if components.unreachable is None else str(components.unreachable),
        )
    )
    then()


def _kernel_options(options: MountOptions) -> set[str]:
    """Return what the kernel mount is asked for."""
    wanted = {"default_permissions", f"subtype={SUBTYPE}"}
    if not any(option.startswith("fsname=") for option in options.fuse_options):
        wanted.add(f"fsname={_source(options)}")
    if options.read_only:
        wanted.add("ro")
    if options.allow_other:
        wanted.add("allow_other")
    ours = {_NOSYMFOLLOW} if _forbids_links(options) else set()
    return wanted | set(options.fuse_options) - ours


def _forbids_links(options: MountOptions) -> bool:
    """Return whether we see to it ourselves that links are not followed, not libfuse."""
    return _NOSYMFOLLOW in options.fuse_options and can_forbid_links()


def _source(options: MountOptions) -> str:
    """Return what mount(8) shows as the source: all members and the prefix, as fstab has them.

    `mount -a` looks for it there, so that it does not mount twice. What does not fit is left out.
    """
    members = ",".join(map(str, options.endpoints)) or "embedded"
    prefix = options.prefix.decode("ascii", "replace")
    source = f"{members}{prefix.removesuffix('/') or prefix}"
    plain = source.isascii() and source.isprintable() and not set(source) & set(" \\")
    fitting = [text for text in (source if plain else members, members) if len(text) < SOURCE_MAX]
    shown = fitting[0] if fitting else str(options.endpoints[0])
    return shown.replace(",", r"\,")  # libfuse's own way to tell it from the next option


def main() -> int:
    """Run the daemon; return its exit code."""
    parser = argparse.ArgumentParser(prog="etcdfs.daemon.main", description=__doc__)
    parser.add_argument("mountpoint", help="for the list of processes; see --options-fd")
    parser.add_argument("--options-fd", type=int, required=True)
    parser.add_argument("--status-fd", type=int)
    arguments = parser.parse_args()
    handover = read_options(arguments.options_fd)
    if handover is None:
        return 0
    manager = find_service_manager()
    reporter = open_reporter(arguments.status_fd, manager.tell)
    if arguments.status_fd is not None:
        os.chdir("/")  # a daemon must not keep anybody's disk busy
    try:
        setup_logging(
            handover.log,
            foreground=arguments.status_fd is None,
            mountpoint=handover.options.mountpoint,
        )
        keep_heap_small()
        faulthandler.enable(_STDERR)  # what dies in a library in C leaves a word, too
        with claimed(handover.options.mountpoint) as claim:
            trio.run(serve, handover.options, reporter, manager, claim)
    except BaseExceptionGroup as group:
        failure = _command_error(group)
        if failure is None:
            _say_why_it_dies(group)
            raise
        return _fail(reporter, failure)
    except CommandError as exc:
        return _fail(reporter, exc)
    except Exception as exc:
        _say_why_it_dies(exc)
        raise
    return 0


def _say_why_it_dies(error: BaseException) -> None:
    why = describe_shortage() if is_shortage(error) else "this is a bug of etcdfs"
    log.critical("the daemon dies: %s", why, exc_info=error)


def _command_error(group: BaseExceptionGroup[BaseException]) -> CommandError | None:
    """Return the one error meant for a person, if the group holds nothing else."""
    wanted, others = group.split(CommandError)
    if wanted is None or others is not None:
        return None
    found: BaseException = wanted
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, CommandError)
    return found


def _fail(reporter: Reporter, error: CommandError) -> int:
    log.debug("not mounted", exc_info=error)
    reporter.report(Failed(message=str(error), exit_code=error.exit_code))
    return error.exit_code


def _end(exit_code: int) -> NoReturn:
    """End the process, as far as it can.

    A thread that waits in the kernel keeps its files open, and with them connections, and pipes
    that somebody reads to the end.
    """
    if is_in_kernel():
        logging.shutdown()
        os.closerange(0, os.sysconf("SC_OPEN_MAX"))
        os._exit(exit_code)
    sys.exit(exit_code)


if __name__ == "__main__":
    _end(main())
