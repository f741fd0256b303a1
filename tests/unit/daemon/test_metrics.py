"""The table of metrics: it has all that the code counts, and is what Prometheus wants."""

import inspect
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

import etcdfs
from etcdfs.daemon.main import ServedComponents
from etcdfs.daemon.metrics import EACH, PREFIX, TABLE, Kind, leaves
from etcdfs.daemon.status import Status
from etcdfs.mirror.state_machine import StateMachine
from etcdfs.options import Endpoint, MountOptions, Security
from etcdfs.snapshots.snapshot_file import SnapshotFile
from etcdfs.snapshots.snapshots import Snapshots
from etcdfs.vfs.filesystem import SpaceStatistics
from tests.support.fake_store import FakeStore
from tests.support.metrics_reference import PAGE, with_table

_SHOWN = [row for row in TABLE if row.kind is not Kind.UNSHOWN]
_NO_COUNTERS = {SpaceStatistics}  # statvfs(3)'s


class NoFile:
    """A snapshot that is not there yet."""

    manifest = None
    path = Path("/state")

    def size(self) -> int:
        return 0


def components(**said: Any) -> ServedComponents:
    """Return everything of a mount, which is not mounted; with a snapshot, if it can have one."""
    options = MountOptions(mountpoint="/mnt", **said)
    file = cast("SnapshotFile", NoFile())
    snapshots = Snapshots(file, options, time.time_ns) if options.cache else None
    made = ServedComponents(options, FakeStore(), snapshots)
    made.operations.requests["lookup"] = 3
    if made.mirror is not None:
        made.mirror.state_machine = StateMachine(made.tree.keyspace.start, made.tree.keyspace.end)
    return made


@pytest.fixture(params=[True, False], ids=["cache", "no-cache"])
async def status(request: pytest.FixtureRequest) -> Status:
    # Of a prefix that has its attributes elsewhere, so that there are audits of both.
    return components(cache=request.param, prefix=b"/app/").status


# --- the rows -------------------------------------------------------------------------------


def test_names_are_prometheus_own() -> None:
    for row in _SHOWN:
        assert re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", row.name), row.source
        assert row.name.endswith("_total") == (row.kind is Kind.COUNTER), row.source
        assert not row.unit or row.name.removesuffix("_total").endswith(row.unit), row.source
        assert not any(row.name.endswith(f"_{unit}") for unit in ("ms", "kb", "mb", "s")), row.name
        assert not row.name.startswith(PREFIX), row.source


def test_every_row_says_what_it_means_in_a_sentence() -> None:
    for row in TABLE:
        assert re.fullmatch(r"[A-Z`].*\.", row.help), row.source


def test_no_two_rows_are_one_sample_and_rows_of_one_name_are_one_metric() -> None:
    sources = [row.source for row in TABLE]
    assert len(sources) == len(set(sources))
    named = defaultdict(list)
    for row in _SHOWN:
        named[row.name].append(row)
    for rows_of_one in named.values():
        labels = [tuple(row.labels.items()) for row in rows_of_one]
        assert len(set(labels)) == len(labels)
        kinds = {(row.kind, row.help, row.unit, *row.labels) for row in rows_of_one}
        assert len(kinds) == 1, rows_of_one[0].name
    # OpenMetrics takes `_total` off: no gauge may be called as the counter is then.
    stems = [name.removesuffix("_total") for name in named]
    assert len(stems) == len(set(stems))


# --- what the code counts -------------------------------------------------------------------


async def test_every_value_of_a_mount_has_a_row_and_every_row_a_value() -> None:
    """Whoever adds a counter adds its row to `etcdfs.daemon.metrics.TABLE`."""
    both = [components(cache=cache, prefix=b"/app/").status.document() for cache in (True, False)]
    there = {leaf for document in both for leaf in leaves(document)}
    assert there == {row.source for row in TABLE}


def counted() -> Iterator[type]:
    """Yield every class of counters in the package."""
    for module in walk_packages(etcdfs.__path__, "etcdfs."):
        if not module.name.endswith("__main__"):
            for name, found in inspect.getmembers(import_module(module.name), inspect.isclass):
                if name.endswith("Statistics") and is_dataclass(found):
                    yield found


async def test_all_counters_of_the_code_are_shown() -> None:
    sections = [
        section() for section in components(cache=True, prefix=b"/app/").status.sections.values()
    ]
    assert set(counted()) - _NO_COUNTERS == {type(one) for one in sections if is_dataclass(one)}


# --- what is made of it ---------------------------------------------------------------------


async def test_all_is_in_prometheus_text(status: Status) -> None:
    families = {f.name: f for f in text_string_to_metric_families(status.prometheus().decode())}
    document = status.document()
    infos = {}
    for row in _SHOWN:
        if row.kind is Kind.INFO:
            infos[row.name] = [value for _, value in row.values(document)]
            continue
        samples = families[PREFIX + row.name.removesuffix("_total")].samples
        for labels, value in row.values(document):
            if value is None:
                continue
            wanted = {row.each: value} if row.kind is Kind.STATE else labels
            found = [sample.value for sample in samples if sample.labels == wanted]
            match row.kind:
                case Kind.STATE:
                    assert found == [1.0]
                case Kind.PRESENCE:
                    assert found == [float(bool(value))]
                case _:
                    assert found == [float(value)], row.source
    (info,) = families[f"{PREFIX}mount_info"].samples
    assert info.value == 1
    assert info.labels.keys() == {name for name, values in infos.items() if values}
    assert "process_resident_memory_bytes" in families


async def test_each_operation_is_a_label(status: Status) -> None:
    text = status.prometheus().decode()
    assert f'{PREFIX}requests_total{{operation="lookup"}} 3.0' in text
    (row,) = (row for row in TABLE if row.source == f"requests.{EACH}")
    assert list(row.values(status.document())) == [({"operation": "lookup"}, 3)]


async def test_the_document_is_json(status: Status) -> None:
    made = status.files()[b"status"]()
    assert json.loads(made).keys() == status.document().keys()


async def test_config_has_all_options_and_no_secret() -> None:
    options = MountOptions(
        mountpoint="/mnt",
        endpoints=(Endpoint("a", 1),),
        security=Security(user="u", password="geheim", password_file="/file"),
    )
    config = ServedComponents(options, FakeStore()).status.files()[b"config"]()
    assert b"geheim" not in config
    read = json.loads(config)
    assert set(read) == set(MountOptions.__slots__)
    assert set(Security.__slots__) - set(read["security"]) == {"password"}


def test_the_reference_is_of_these_rows() -> None:
    page = PAGE.read_text()
    assert page == with_table(page), "run `make reference`"


# --- what is drawn, and what raises an alarm ------------------------------------------------

_MONITORING = PAGE.parent / "monitoring"
_OTHERS = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total"}
_WORDS = {"sum", "by", "rate", "increase", "and", "instance", "job", "m", "h"}


def expressions() -> list[str]:
    """Return every expression of the dashboard and of the alerts."""
    dashboard = json.loads((_MONITORING / "dashboard.json").read_text())
    drawn = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    queries = [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    alerts = re.findall(r"^ +expr: (.*)$", (_MONITORING / "alerts.yml").read_text(), re.MULTILINE)
    assert len(drawn) > 10
    assert len(alerts) > 5
    return [*drawn, *alerts, *(query.removeprefix("label_values") for query in queries)]


def test_what_is_drawn_and_what_raises_an_alarm_are_metrics_that_exist() -> None:
    there = _OTHERS | {PREFIX + row.name for row in _SHOWN} | {f"{PREFIX}mount_info"}
    labels = {label for row in _SHOWN for label in (*row.labels, row.each)}
    for expression in expressions():
        named = set(re.findall(r"[a-z][a-z_]*", re.sub(r'"[^"]*"|\$\w+', "", expression)))
        assert named - there - labels - _WORDS == set(), expression


def test_what_must_not_be_missed_raises_an_alarm() -> None:
    alarms = (_MONITORING / "alerts.yml").read_text()
    for name in ("stale_seconds", "connected", "audits_differing_total", "reads_suspended"):
        assert re.search(rf"expr: .*\b{PREFIX}{name}\b", alarms)
