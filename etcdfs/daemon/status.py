"""What a mount says of itself: one document, as JSON, as Prometheus text, and what it was told.

Knows: who is asked for which section, and the forms. Does not know: what the values mean (that is
`metrics`), and who reads them (an extended attribute, the control directory, HTTP, a signal).

Nothing here waits, least of all for etcd: all is in memory.

Concurrency: trio thread; `Problems` is told from any.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, final

from etcdfs import __version__
from etcdfs.daemon.metrics import PREFIX, TABLE, Kind, Metric
from etcdfs.daemon.metrics_server import Page
from etcdfs.options import MountOptions, encode_options
from etcdfs.process.printable import printable

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

Section = Callable[[], Any]
"""Returns an instance of a dataclass, a mapping or a plain value."""


@final
class Status:
    """The status document of one mount, and the forms it takes.

    Attributes:
        sections: Who is asked for which.
        problems: To be made a handler of the log.
    """

    def __init__(self, options: MountOptions, sections: Mapping[str, Section]) -> None:
        # --- dependencies
        self.sections = sections
        # --- constants
        self._options = options
        self._started_at = time.time()
        self._since = time.monotonic()
        self.problems = Problems()

    def document(self) -> dict[str, Any]:
        """Return all values, by section; `metrics.TABLE` has a row for each."""
        document = {"mount": self._mount(), "log": self.problems.counted()}
        for name, section in self.sections.items():
            found = section()
            is_instance = is_dataclass(found) and not isinstance(found, type)
            document[name] = asdict(found) if is_instance else found
        return document

    def _mount(self) -> dict[str, Any]:
        options = self._options
        return {
            "version": __version__,
            "pid": os.getpid(),
            "mountpoint": options.mountpoint,
            "prefix": printable(options.prefix.decode(errors="backslashreplace")),
            "mode": "cache" if options.cache else "no-cache",
            "access": "ro" if options.read_only else "rw",
            "started_at": self._started_at,
            "uptime_s": time.monotonic() - self._since,
        }

    def files(self) -> dict[bytes, Callable[[], bytes]]:
        """Return what makes the content of each file of the control directory, by its name."""
        return {
            b"config": self._config,
            b"metrics": self.prometheus,
            b"revision": lambda: b"%d\n" % self.revision,
            b"status": lambda: _as_json(self.document()),
        }

    def pages(self) -> dict[str, Callable[[], Page]]:
        """Return what makes each page of `--metrics-listen`, by its path."""
        return {
            "/metrics": lambda: (HTTPStatus.OK, self.prometheus()),
            "/healthz": self._healthz,
        }

    def _healthz(self) -> Page:
        shows_nothing = self._options.cache and self.sections["staleness"]().refused
        status = HTTPStatus.SERVICE_UNAVAILABLE if shows_nothing else HTTPStatus.OK
        return status, f"{self.line()}\n".encode()

    def line(self) -> str:
        """Return the state of the mount in one line, as `systemctl status` shows it."""
        if not self._options.cache:
            return "Mounted; every operation asks etcd"
        staleness = self.sections["staleness"]()
        line = f"Revision {self.revision}, {staleness.stale_s:.0f} s behind"
        if staleness.refused:
            return f"{line}; nothing is shown: {printable(staleness.refused)}"
        return line if staleness.connected else f"{line}; etcd is silent"

    @property
    def revision(self) -> int:
        """The revision that readers see; without a cache, the newest that etcd answered with."""
        shown: int = self.sections["mirror" if self._options.cache else "store"]().revision
        return shown

    def _config(self) -> bytes:
        """Return what the mount was told, as JSON; nothing in it is secret."""
        encoded = encode_options(self._options)
        del encoded["security"]["password"]
        return _as_json(encoded)

    def prometheus(self) -> bytes:
        """Return the document in Prometheus' text format."""
        # Takes as long to load as a tenth of the whole daemon, and few mounts are ever asked.
        from prometheus_client import CollectorRegistry, ProcessCollector  # noqa: PLC0415
        from prometheus_client.exposition import generate_latest  # noqa: PLC0415

        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Collector(self.document()))
        return generate_latest(registry)


@final
class Problems(logging.Handler):
    """Counts what the daemon logs as a warning or worse, and keeps the last of it.

    `logging` itself sees to it that an error is logged once, and says what it is about; so an
    operator finds here whatever went wrong last, wherever that was.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._warnings = self._errors = 0
        self._last: tuple[str, float] | tuple[None, None] = (None, None)

    def emit(self, record: logging.LogRecord) -> None:
        """Count one record."""
        if record.levelno >= logging.ERROR:
            self._errors += 1
        else:
            self._warnings += 1
        try:
            self._last = (printable(record.getMessage()), record.created)
        except Exception:  # noqa: BLE001 - logging's own rule: a wrong call must not end anything
            self.handleError(record)

    def counted(self) -> dict[str, Any]:
        """Return the section `log`."""
        last, last_at = self._last
        return {
            "warnings": self._warnings,
            "errors": self._errors,
            "last_problem": last,
            "last_problem_at": last_at,
        }


@final
class _Collector:
    """Makes metrics of a document; prometheus_client writes them down."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def collect(self) -> "Iterator[Family]":
        """Yield each metric, with its samples."""
        from prometheus_client.core import (  # noqa: PLC0415 -- see `Status.prometheus`
            CounterMetricFamily,
            GaugeMetricFamily,
        )

        for name, rows in _by_name().items():
            labels = list(rows[0].labels) + ([rows[0].each] if rows[0].each else [])
            make = CounterMetricFamily if rows[0].kind is Kind.COUNTER else GaugeMetricFamily
            family = make(PREFIX + name, rows[0].help, labels=labels)
            for said, value in self._samples(rows):
                family.add_metric([said[label] for label in labels], value)
            yield family
        infos = dict(self._infos())
        info = GaugeMetricFamily(
            f"{PREFIX}mount_info", "The mount; always 1, what it is in labels.", labels=list(infos)
        )
        info.add_metric(list(infos.values()), 1)
        yield info

    def _samples(self, rows: Iterable[Metric]) -> Iterator[tuple[dict[str, str], float]]:
        for row in rows:
            for labels, value in row.values(self._document):
                match row.kind:
                    case Kind.STATE:
                        yield labels | {row.each: str(value)}, 1
                    case Kind.PRESENCE:
                        yield labels, bool(value)
                    case _:
                        if value is not None:
                            yield labels, value

    def _infos(self) -> Iterator[tuple[str, str]]:
        for row in TABLE:
            if row.kind is Kind.INFO:
                for _, value in row.values(self._document):
                    yield row.name, value if isinstance(value, str) else ",".join(value)


def _by_name() -> dict[str, list[Metric]]:
    """Return the rows of the table that make a metric of their own, by its name."""
    named: dict[str, list[Metric]] = {}
    for row in TABLE:
        if row.kind not in (Kind.INFO, Kind.UNSHOWN):
            named.setdefault(row.name, []).append(row)
    return named


_INDENT: Final = 2


def _as_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=_INDENT, sort_keys=True).encode() + b"\n"
