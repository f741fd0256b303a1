"""Which answers of etcd are none."""

import pytest

from etcdfs.keyspace.store import Get, KeyValue, Page, Revision
from etcdfs.keyspace.transaction_results import fault_in_page


def entry(key: bytes, revision: int = 1) -> KeyValue:
    return KeyValue(key, b"", Revision(revision), Revision(revision), 1)


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        (Page((), Revision(1), more=False), None),  # of an etcd in which nothing was ever written
        (Page((), Revision(0), more=False), "at revision 0 was answered at 0"),
        (Page((entry(b"a"),), Revision(1), more=True, remaining=1), None),
        (Page((entry(b"a"),), Revision(1), more=True, remaining=0), "counts no key"),
        (
            Page((entry(b"a"), entry(b"b")), Revision(1), more=False),
            "2 keys came where 1 were asked for",
        ),
        (Page((), Revision(1), more=True, remaining=1), "for no reason"),
    ],
)
def test_pages_at_the_edge_of_what_can_be(page: Page, fault: str | None) -> None:
    found = fault_in_page(page, Get(b"a", b"z", limit=1))
    assert found is None if fault is None else found is not None and fault in found
