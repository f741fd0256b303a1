"""Whatever comes from etcd, it is refused or it is what the rest relies on.

The corpus holds answers as text (protobuf's text format), one a file: what was once wrong, and
what is right. From there Hypothesis goes on, by changing what is in a message and by damaging its
bytes. What it finds is put there as another file.
"""

from pathlib import Path
from typing import Any

from aetcd import rpc
from google.protobuf import text_format
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from etcdfs.errors import StoreError
from etcdfs.etcd import codec as wire
from etcdfs.etcd.watch import Responses
from etcdfs.keyspace.keys import Keyspace
from etcdfs.keyspace.store import Get, KeyValue, Page, Revision, WatchEvents, WatchOpened, range_end
from etcdfs.keyspace.transaction_results import fault_in_page
from etcdfs.mirror.messages import (
    Apply,
    Message,
    OpenWatch,
    PageArrived,
    Read,
    RevisionCompacted,
    Step,
    WatchLost,
)
from etcdfs.mirror.state_machine import State, StateMachine
from etcdfs.tree.tree import Tree
from etcdfs.tree.update import Update

CORPUS = Path(__file__).parent / "corpus"
ROOT = Keyspace(b"/t/")
NUMBERS = (0, 1, 2, 3, 5, 6, 7, -1, 2**31, 2**62, 2**63 - 1, -(2**63))
KEYS = (
    b"",
    b"\0",
    b"/t/",
    b"/t/a",
    b"/t/a/b",
    b"/t/b",
    b"/t/" + b"/" * 300,
    b"/t0",
    b"\xff",
    b"/s",
)

numbers = st.sampled_from(NUMBERS)
texts = st.sampled_from(KEYS)


def _corpus(kind: str, message: type[Any]) -> list[Any]:
    return [
        text_format.Parse(file.read_text(), message())
        for file in sorted(CORPUS.glob(f"{kind}-*.txtpb"))
    ]


RANGES = _corpus("range", rpc.RangeResponse)
STREAMS = _corpus("watch", rpc.WatchResponse)

headers = st.builds(rpc.ResponseHeader, revision=numbers)
kvs = st.builds(
    lambda key, created, modified, version: {
        "key": key,
        "create_revision": created,
        "mod_revision": modified,
        "version": version,
    },
    texts,
    numbers,
    numbers,
    numbers,
)
made_ranges = st.builds(
    rpc.RangeResponse,
    header=headers,
    kvs=st.lists(kvs, max_size=4),
    more=st.booleans(),
    count=numbers,
)
made_watches = st.builds(
    lambda header, watch_id, created, canceled, compacted, fragment, events: rpc.WatchResponse(
        header=header,
        watch_id=watch_id,
        created=created,
        canceled=canceled,
        compact_revision=compacted,
        fragment=fragment,
        events=[rpc.Event(type=kind, kv=kv) for kind, kv in events],
    ),
    headers,
    st.sampled_from((0, 0, 0, -1, 7)),
    st.booleans(),
    st.sampled_from((False, False, False, True)),
    numbers,
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(("PUT", "DELETE")), kvs), max_size=4),
)


@st.composite
def damaged(draw: st.DrawFn, corpus: list[Any]) -> Any:
    """Return a message of the corpus, mostly with some of its bytes changed."""
    message = draw(st.sampled_from(corpus))
    data = bytearray(message.SerializeToString())
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    try:
        return type(message).FromString(bytes(data))
    except DecodeError:
        return message


ranges = made_ranges | damaged(RANGES)
watches = st.lists(made_watches | damaged(STREAMS), max_size=8)


def is_right(page: Page, get: Get, revision: int) -> bool:
    """Tell, key by key, whether a page keeps what etcd guarantees."""
    keys = [entry.key for entry in page.entries]
    at = revision or page.revision
    if get.end is None:
        in_range = all(key == get.key for key in keys)
    else:
        in_range = all(key and get.key <= key < get.end for key in keys)
    return (
        in_range
        and keys == sorted(set(keys))
        and (not get.limit or len(keys) <= get.limit)
        and (not page.more or (bool(keys) and bool(get.limit) and page.remaining != 0))
        and 0 < page.revision < 2**63 - 1
        and page.revision >= revision
        and all(0 < e.create_revision <= e.mod_revision <= at for e in page.entries)
        and all(e.version > 0 for e in page.entries)
    )


gets = st.sampled_from(
    (Get(b"/t/a"), Get(b"/t/", b"/t0"), Get(b"/t/", b"/t0", limit=2), Get(b"/t/b", b"/t0", limit=1))
)


@given(ranges, gets, st.sampled_from((0, 3, 6)))
def test_b77_a_range_is_refused_or_what_was_asked_for(
    response: Any, get: Get, revision: int
) -> None:
    page = wire.page(response)
    if fault_in_page(page, get, revision) is None:
        assert is_right(page, get, revision)


def test_b77_the_corpus_of_ranges_tells_right_from_wrong() -> None:
    get = Get(b"/t/", b"/t0", limit=2)
    for file in sorted(CORPUS.glob("range-*.txtpb")):
        page = wire.page(text_format.Parse(file.read_text(), rpc.RangeResponse()))
        is_good = file.name.startswith("range-good")
        assert (fault_in_page(page, get) is None) == is_good, file.name


# --- a watch --------------------------------------------------------------------------------


class Life:
    """A replica with a tree, as a mirror has them, that is told whatever there is."""

    def __init__(self) -> None:
        self.tree = Tree(ROOT, lambda: 1, complete=True)
        self.update = Update(self.tree)
        self.state_machine = StateMachine(ROOT.start, ROOT.end)
        self.responses: Responses | None = None
        self._step(self.state_machine.start())

    def hear(self, response: Any) -> None:
        assert self.responses is not None
        message: Message | None
        try:
            message = _read(self.responses, response)
        except StoreError as exc:
            compacted = getattr(exc, "compact_revision", None)
            message = WatchLost(str(exc)) if compacted is None else RevisionCompacted(compacted)
        if isinstance(message, WatchEvents | WatchOpened | WatchLost | RevisionCompacted):
            self._step(self.state_machine.receive(message))
        if self.state_machine.state is not State.OPENING:
            self.tree.check_invariants()

    def _step(self, steps: tuple[Step, ...]) -> None:
        """Carry steps out; whatever is read is what the tree has at that revision."""
        while steps:
            answer: Message | None = None
            for step in steps:
                match step:
                    case Read(start, end, revision, limit):
                        answer = PageArrived(self._page(start, end, revision, limit))
                    case OpenWatch(from_revision):
                        request = wire.watch_create_request(ROOT.start, ROOT.end, from_revision)
                        self.responses = Responses(request, "etcd")
                    case Apply(events):
                        self.update.apply(self.update.plan(events))
                    case _:
                        pass
            steps = () if answer is None else self.state_machine.receive(answer)

    def _page(self, start: bytes, end: bytes | None, revision: int, limit: int) -> Page:
        end = range_end(start) if end is None else end
        found = sorted(
            KeyValue(key, b"", *key_state[:4])
            for key, key_state in self.tree.key_state()
            if start <= key < end and (not revision or key_state.mod_revision <= revision)
        )
        newest = max((entry.mod_revision for entry in found), default=Revision(1))
        return Page(tuple(found[:limit]), Revision(max(newest, revision, 5)), more=False)


def _read(responses: Responses, response: Any) -> Message | None:
    """Read a response that is small, so that nothing is waited for."""
    try:
        responses.read(response).send(None)
    except StopIteration as end:
        message: Message | None = end.value
        return message
    raise AssertionError("it waits")


@given(watches)
@example([])
def test_b77_whatever_a_watch_says_the_replica_goes_on(responses: list[Any]) -> None:
    life = Life()
    opened = rpc.WatchResponse(header=rpc.ResponseHeader(revision=5), created=True)
    for response in [opened, *responses]:
        life.hear(response)
        life.state_machine.check_invariants()


def test_b77_each_stream_of_the_corpus_is_survived() -> None:
    for response in STREAMS:
        life = Life()
        life.hear(rpc.WatchResponse(header=rpc.ResponseHeader(revision=5), created=True))
        for told in (response, *STREAMS):
            life.hear(told)
            life.state_machine.check_invariants()
