"""The table of all that a mount counts and says of itself: one row, wherever it is shown.

Knows: of each value where it stands in the status document, what Prometheus calls it, and what it
means. Does not know: how values come about, and how they are shown.

The status document is a dictionary of sections (`etcdfs.daemon.status`): it is the extended attribute
`user.etcdfs.statistics`, the file `.etcdfs/status`, and what `etcdfs status --json` prints. What
`.etcdfs/metrics` and `--metrics-listen` say, and the reference of metrics, come from these rows.

Concurrency: none; frozen values and pure functions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final

PREFIX: Final = "etcdfs_"
"""What every name begins with."""

EACH: Final = "*"
"""In the place of a key of `source`: each key of a section whose keys are not known before."""


class Kind(Enum):
    """What becomes of a value as a metric."""

    COUNTER = auto()  # it only grows, and begins anew with the daemon
    GAUGE = auto()
    FLAG = auto()  # 1 or 0; no sample while it is None
    PRESENCE = auto()  # 1 if there is a text, else 0
    STATE = auto()  # 1, with the text as the label `each`
    INFO = auto()  # 1, all such texts of the table are labels of one metric
    UNSHOWN = auto()  # of the document only


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row.

    Attributes:
        source: Where the value stands in the status document: `section.key`, or `key`.
        name: The metric's name without `PREFIX`; of an `INFO` the label's; "" if `UNSHOWN`.
        kind: What becomes of it.
        help: What it means, for an operator.
        unit: Of the value, in Prometheus' base units; "" if it is a plain number or text.
        labels: Labels of the sample.
        each: The label that takes the key in the place of `EACH`, or the text of a `STATE`.
    """

    source: str
    name: str
    kind: Kind
    help: str
    unit: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    each: str = ""

    def values(self, document: Mapping[str, Any]) -> Iterator[tuple[dict[str, str], Any]]:
        """Yield the values that a document has for this row, each with its labels."""
        found: Any = document
        *path, last = self.source.split(".")
        for step in path:
            found = found.get(step)
            if found is None:  # this mount has no such section
                return
        if last == EACH:
            yield from (({**self.labels, self.each: key}, found[key]) for key in sorted(found))
        elif last in found:
            yield dict(self.labels), found[last]


def _counter(source: str, name: str, help_text: str, **labels: str) -> Metric:
    return Metric(source=source, name=name, kind=Kind.COUNTER, help=help_text, labels=labels)


def _gauge(source: str, name: str, help_text: str, unit: str = "", **labels: str) -> Metric:
    return Metric(
        source=source, name=name, kind=Kind.GAUGE, help=help_text, unit=unit, labels=labels
    )


def _flag(source: str, name: str, help_text: str) -> Metric:
    return Metric(source=source, name=name, kind=Kind.FLAG, help=help_text)


def _presence(source: str, name: str, help_text: str) -> Metric:
    return Metric(source=source, name=name, kind=Kind.PRESENCE, help=help_text)


def _state(source: str, name: str, help_text: str, label: str) -> Metric:
    return Metric(source=source, name=name, kind=Kind.STATE, help=help_text, each=label)


def _info(source: str, name: str, help_text: str) -> Metric:
    return Metric(source=source, name=name, kind=Kind.INFO, help=help_text)


def _unshown(source: str, help_text: str, unit: str = "") -> Metric:
    return Metric(source=source, name="", kind=Kind.UNSHOWN, help=help_text, unit=unit)


def _audit(section: str, of: str) -> tuple[Metric, ...]:
    """Return the rows of one of the two audits."""
    return (
        _counter(f"{section}.audits", "audits_total", "Audits that came to a verdict.", of=of),
        _counter(
            f"{section}.void",
            "audits_void_total",
            "Audits without a verdict: the connection was lost, or too much changed.",
            of=of,
        ),
        _counter(
            f"{section}.failed",
            "audits_failed_total",
            "Audits that etcd did not answer, or refused.",
            of=of,
        ),
        _counter(
            f"{section}.differing",
            "audits_differing_total",
            "Audits that found the mirror different from etcd, and mended it.",
            of=of,
        ),
        _counter(
            f"{section}.differences",
            "audit_differences_total",
            "Keys that differed, in all audits.",
            of=of,
        ),
        _gauge(
            f"{section}.revision",
            "audit_revision",
            "Revision of the last audit with a verdict.",
            of=of,
        ),
        _gauge(
            f"{section}.keys",
            "audit_keys",
            "Keys that the last audit with a verdict compared.",
            of=of,
        ),
        _gauge(
            f"{section}.seconds",
            "audit_duration_seconds",
            "How long the last audit with a verdict took.",
            "seconds",
            of=of,
        ),
        _counter(
            f"{section}.swept",
            "audit_swept_total",
            "Void records of attributes that were deleted.",
            of=of,
        ),
    )


TABLE: Final[tuple[Metric, ...]] = (
    # --- the mount
    _info("mount.version", "version", "The version of etcdfs."),
    _info("mount.mountpoint", "mountpoint", "Where it is mounted."),
    _info("mount.prefix", "prefix", "The prefix of the keys that are shown, made printable."),
    _info("mount.mode", "mode", "`cache` or `no-cache`."),
    _info("mount.access", "access", "`ro` or `rw`."),
    _unshown("mount.pid", "The daemon's process."),
    _unshown("mount.started_at", "When the daemon was started, in seconds since 1970.", "seconds"),
    _unshown("mount.uptime_s", "For how long it has been running.", "seconds"),
    Metric(
        source=f"requests.{EACH}",
        name="requests_total",
        kind=Kind.COUNTER,
        help="Requests of the kernel.",
        each="operation",
    ),
    _gauge("admission.waiting", "requests_waiting", "Requests of the kernel that wait for etcd."),
    _counter(
        "admission.refused",
        "requests_refused_total",
        "Requests that were refused (EAGAIN), as too many waited.",
    ),
    _gauge("open_files", "open_files", "Open file handles."),
    _unshown("fast_path", "What the fast path has the kernel do; nothing without it."),
    # --- files that the kernel opens without asking
    _gauge("unopened.held", "superseded_held", "Old versions of files that the kernel holds."),
    _gauge("unopened.behind", "superseded_open", "Those of them that are taken to be open."),
    _counter("unopened.looks", "superseded_looks_total", "Times that was looked who has one open."),
    _counter(
        "unopened.followed",
        "superseded_followed_total",
        "Old versions that became the newest one, as nobody had them open any more.",
    ),
    # --- inotify
    _counter("inotify.replayed", "inotify_replays_total", "Changes that raised inotify events."),
    _counter(
        "inotify.coalesced", "inotify_coalesced_total", "Changes that became one with others."
    ),
    _counter("inotify.unwatched", "inotify_unwatched_total", "Changes that nobody watched."),
    _counter("inotify.outdated", "inotify_outdated_total", "Replays given up for newer changes."),
    _counter("inotify.dropped", "inotify_dropped_total", "Changes that could raise no events."),
    _counter("inotify.looks", "inotify_looks_total", "Times that was looked who watches."),
    _gauge("inotify.waiting", "inotify_names_waiting", "Names whose changes are yet to be told."),
    _gauge("inotify.stuck", "inotify_stuck", "Replays that wait for a lock which is not let go."),
    # --- etcd
    _info("store.endpoints", "endpoints", "The members, in order of preference."),
    _state("store.endpoint", "endpoint_in_use", "The member in use.", "endpoint"),
    _counter("store.ranges", "etcd_requests_total", "Requests to etcd.", kind="range"),
    _counter("store.transactions", "etcd_requests_total", "Requests to etcd.", kind="transaction"),
    _counter("store.watches", "etcd_requests_total", "Requests to etcd.", kind="watch"),
    _counter("store.moves", "endpoint_changes_total", "Times that another member was tried."),
    _gauge("store.revision", "etcd_revision", "Newest revision that etcd has answered with."),
    _flag("staleness.connected", "connected", "Whether the watch stands and etcd answers."),
    _gauge(
        "staleness.state_s",
        "connection_state_seconds",
        "For how long it has been connected, or has not been.",
        "seconds",
    ),
    _gauge("staleness.silent_s", "etcd_silent_seconds", "Since etcd was last heard.", "seconds"),
    _gauge("staleness.stale_s", "stale_seconds", "How old what is shown may be.", "seconds"),
    _presence(
        "staleness.refused", "reads_suspended", "Whether nothing is shown; the text says why."
    ),
    _counter("staleness.losses", "connection_losses_total", "Times that the connection was lost."),
    _counter("staleness.refusals", "read_suspensions_total", "Times that showing was stopped."),
    # --- the mirror
    _gauge("mirror.revision", "mirror_revision", "The revision that readers see."),
    _gauge(
        "mirror.lag",
        "mirror_lag_revisions",
        "Revisions between what readers see and etcd_revision; other prefixes' count as well.",
        "revisions",
    ),
    _gauge("mirror.keys", "mirror_keys", "Keys that are there, as counted every two seconds."),
    _gauge("mirror.bytes", "mirror_values_bytes", "Their values, as counted then.", "bytes"),
    _gauge("mirror.listed_keys", "mirror_listed_keys", "Keys in the last listing."),
    _unshown("mirror.connected", "As `staleness.connected`."),
    _counter("mirror.batches", "mirror_batches_total", "Batches of changes shown."),
    _counter("mirror.events", "mirror_events_total", "Changes that were shown."),
    _counter(
        "mirror.collapsed",
        "mirror_events_collapsed_total",
        "Changes that nobody saw: a later one of their key was there already.",
    ),
    _counter(
        "mirror.early",
        "mirror_batches_early_total",
        "Batches shown before the kernel had let go, for a call that held its lock.",
    ),
    _counter(
        "mirror.ahead",
        "mirror_ahead_total",
        "Own changes that were applied before the watch brought them.",
    ),
    _state(
        "state_machine.state", "mirror_state", "The state of the mirror's state machine.", "state"
    ),
    _gauge(
        "state_machine.revision", "mirror_applied_revision", "Up to where changes were taken in."
    ),
    _counter("state_machine.lists", "mirror_listings_total", "Listings that became the state."),
    _counter(
        "state_machine.resumes", "watch_resumes_total", "Breaks after which the watch went on."
    ),
    _counter("state_machine.breaks", "watch_breaks_total", "Watches lost."),
    _counter(
        "state_machine.compactions",
        "watch_compactions_total",
        "Times that a revision asked for was compacted away.",
    ),
    _counter(
        "state_machine.refuted",
        "history_refuted_total",
        "Times that etcd turned out to be another.",
    ),
    _counter(
        "state_machine.regressions",
        "history_regressions_total",
        "Listings at a revision before the last one known.",
    ),
    _counter(
        "state_machine.violations",
        "watch_violations_total",
        "Times that a guarantee of the watch was broken.",
    ),
    _counter(
        "state_machine.doubts",
        "mirror_doubts_total",
        "Times that the mirror was listed anew for doubt.",
    ),
    _counter(
        "state_machine.applied_events", "watch_events_applied_total", "Events of the watch applied."
    ),
    _counter(
        "state_machine.dropped_duplicates",
        "watch_events_duplicate_total",
        "Events of the watch dropped, as applied before.",
    ),
    *_audit("audit", "keys"),
    *_audit("attribute_audit", "attributes"),
    # --- the snapshot
    _flag(
        "snapshot.offline",
        "snapshot_offline",
        "Whether a snapshot is shown because etcd has not answered since the mount began.",
    ),
    _gauge("snapshot.keys", "snapshot_keys", "Keys in the snapshot on disk."),
    _gauge("snapshot.revision", "snapshot_revision", "The revision of the snapshot on disk."),
    _gauge("snapshot.size", "snapshot_size_bytes", "What it takes on disk.", "bytes"),
    _gauge(
        "snapshot.age_s",
        "snapshot_age_seconds",
        "Since the snapshot on disk was known to be what etcd had; 0 if there is none.",
        "seconds",
    ),
    _gauge("snapshot.waiting", "snapshot_waiting", "Changes and keys that are not written yet."),
    _counter("snapshot.writes", "snapshot_writes_total", "Times that it was written."),
    _counter("snapshot.failures", "snapshot_failures_total", "Times that it could not be."),
    _presence(
        "snapshot.error",
        "snapshot_failing",
        "Whether it could not be written the last time; the text says why.",
    ),
    _presence(
        "snapshot.refused",
        "snapshot_refused",
        "Whether the one that was found at the start was of no use; the text says why.",
    ),
    # --- caches
    _gauge("tree.inodes_known", "inodes", "Inodes that the kernel holds."),
    _gauge(
        "tree.old_versions",
        "inodes_old",
        "Inodes that no path leads to any more: held open, or not forgotten.",
    ),
    _gauge("tree.negatives", "negative_dentries", "Missing names that the kernel may remember."),
    _gauge("value_cache.entries", "value_cache_entries", "Values held in memory."),
    _gauge("value_cache.size", "value_cache_bytes", "Memory that values held take.", "bytes"),
    _gauge(
        "value_cache.capacity",
        "value_cache_limit_bytes",
        "The most memory that values may take.",
        "bytes",
    ),
    _counter("value_cache.hits", "value_cache_hits_total", "Values asked for and found in memory."),
    _counter("value_cache.misses", "value_cache_misses_total", "Values asked for and not found."),
    _counter(
        "value_cache.evictions",
        "value_cache_evictions_total",
        "Values dropped to make room for others.",
    ),
    _counter(
        "kernel.submitted", "invalidations_submitted_total", "Invalidations that were ordered."
    ),
    _counter("kernel.finished", "invalidations_finished_total", "Invalidations that are done."),
    _counter(
        "kernel.invalidated",
        "invalidated_total",
        "Dentries and attributes that the kernel has dropped.",
    ),
    _gauge(
        "kernel.waiting",
        "invalidations_waiting",
        "Dentries and attributes that the kernel is still to drop.",
    ),
    _counter(
        "kernel.stored", "kernel_values_stored_total", "Values given to the kernel at an open."
    ),
    _gauge(
        "kernel.stuck",
        "stuck_directories",
        "Directories whose lock some process holds, so that old names cannot be dropped.",
    ),
    _counter("kernel.stuck_ever", "directories_stuck_total", "Times that one was stuck."),
    # --- writing
    _gauge("write_buffer.files", "dirty_files", "Files that are written and not published yet."),
    _gauge(
        "write_buffer.size",
        "dirty_bytes",
        "Bytes of files that are written and not published yet.",
        "bytes",
    ),
    _counter("write_buffer.refused", "writes_refused_total", "Writes that found no room."),
    _counter("writeback.puts", "writeback_puts_total", "Values written to etcd."),
    _counter(
        "writeback.unchanged",
        "writeback_unchanged_total",
        "Values not written, as etcd had them already.",
    ),
    _counter(
        "writeback.rebased_appends",
        "writeback_rebased_appends_total",
        "Appends that were put behind what another client had written.",
    ),
    _counter(
        "writeback.dropped",
        "writeback_dropped_total",
        "Values dropped, as their file was deleted or replaced.",
    ),
    _counter(
        "writeback.resolved",
        "writeback_resolved_total",
        "Writes whose answer was lost, and that were found in etcd.",
    ),
    # --- attributes, and problems
    _flag(
        "attributes.readable",
        "attributes_readable",
        "Whether roles let the mount read attributes; if not, all is its owner's alone.",
    ),
    _flag(
        "attributes.writable",
        "attributes_writable",
        "Whether roles let the mount write attributes when it last did.",
    ),
    _counter(
        "attributes.closings",
        "attributes_closings_total",
        "Times that attributes could not be read any more.",
    ),
    _counter(
        "attributes.refusals",
        "attributes_refused_total",
        "Writes of attributes that roles refused.",
    ),
    _presence(
        "key_outside",
        "keys_outside_prefix",
        "Whether there are keys without a leading slash, which the default prefix does not show.",
    ),
    _counter("log.warnings", "log_messages_total", "Messages logged.", level="warning"),
    _counter("log.errors", "log_messages_total", "Messages logged.", level="error"),
    _unshown("log.last_problem", "The last warning or error that was logged."),
    _gauge(
        "log.last_problem_at",
        "last_problem_time_seconds",
        "When the last warning or error was logged, in seconds since 1970.",
        "seconds",
    ),
)
"""Every value of the status document, in the order in which it is shown."""


def leaves(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the `source` of each value in a status document, whether it has a row or not."""
    each = {m.source.removesuffix(f".{EACH}") for m in TABLE if m.source.endswith(EACH)}
    for key, value in document.items():
        if key in each:
            yield f"{key}.{EACH}"
        elif isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in value)
        else:
            yield key
