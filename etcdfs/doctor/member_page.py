"""What a member says of itself by HTTP, where it serves metrics: its clock, and its quota.

Knows: that a page has the time at which it was made, and etcd's names for what is asked. Does not
know: gRPC; etcd's API has neither.

Concurrency: a thread for each page, bounded.
"""

import http
import http.client
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Final

import trio
from prometheus_client.parser import text_string_to_metric_families

from etcdfs.doctor.machine import Finding, Level
from etcdfs.etcd.tls import page_context
from etcdfs.options import Endpoint, Security

SKEW_MAX_S: Final = 2.0
"""What clocks may differ by: times of files come from the machine that writes them."""

FULL: Final = 0.8

_PAGE_MAX: Final = 8 << 20
_QUOTA: Final = "etcd_server_quota_backend_bytes"
_USED: Final = "etcd_mvcc_db_total_size_in_bytes"
_IN_USE: Final = "etcd_mvcc_db_total_size_in_use_in_bytes"

Clock = Callable[[], float]
"""Seconds since the epoch."""


async def check_page(
    endpoint: Endpoint, security: Security, timeout_s: float, *, clock: Clock = time.time
) -> list[Finding]:
    """Return what is found of a member's clock and quota."""
    ask = partial(_ask, endpoint, security, timeout_s, clock)
    try:
        with trio.fail_after(2 * timeout_s):
            found = await trio.to_thread.run_sync(ask, abandon_on_cancel=True)
    except (OSError, ValueError, http.client.HTTPException, trio.TooSlowError) as exc:
        why = str(exc) or "no answer in time"
        return [Finding(Level.NOTE, "clock", f"{endpoint}: its clock is not known: {why}")]
    return [Finding(level, check, f"{endpoint}: {text}") for level, check, text in found]


_Found = tuple[Level, str, str]


def _ask(endpoint: Endpoint, security: Security, timeout_s: float, clock: Clock) -> list[_Found]:
    """Ask for the page, and return what is in it."""
    if endpoint.host.startswith("/"):
        return []  # an etcd of this very machine
    connection = (
        http.client.HTTPSConnection(
            endpoint.host, endpoint.port, timeout=timeout_s, context=page_context(security)
        )
        if endpoint.secure
        else http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=timeout_s)
    )
    try:
        connection.connect()
        before = clock()
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        after = clock()
        text = (
            answer.read(_PAGE_MAX).decode(errors="replace")
            if answer.status == http.HTTPStatus.OK
            else ""
        )
    finally:
        connection.close()
    said = parsedate_to_datetime(answer.headers["Date"] or "").timestamp()
    return [_clock(before, after, said), *_quota(text)]


def _clock(before: float, after: float, said: float) -> _Found:
    """Say how far a clock is off which said a whole second at some time between two."""
    behind, ahead = before - (said + 1), said - after
    if max(behind, ahead) <= SKEW_MAX_S:
        return Level.OK, "clock", "its clock is this machine's, to a second"
    off = f"{behind:.0f} s behind" if behind > 0 else f"{ahead:.0f} s ahead of"
    return Level.PROBLEM, "clock", f"its clock is {off} this machine's: times of files will differ"


def _quota(text: str) -> Iterator[_Found]:
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name in {_QUOTA, _USED, _IN_USE}
    }
    if not found.get(_QUOTA) or _USED not in found:
        yield Level.NOTE, "quota", "it does not say its quota (--listen-metrics-urls elsewhere?)"
        return
    quota, used = found[_QUOTA], found[_USED]
    left = f"{used / 2**20:.1f} of {quota / 2**20:.1f} MiB of its quota are used"
    if used <= FULL * quota:
        yield Level.OK, "quota", left
        return
    gain = (used - found.get(_IN_USE, used)) / 2**20
    yield Level.PROBLEM, "quota", f"{left}; etcdctl defrag frees {gain:.1f}"
