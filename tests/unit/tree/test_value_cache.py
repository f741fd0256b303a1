"""The values in memory are those that were put, least recently used first out."""

import tracemalloc

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from etcdfs.keyspace.store import Revision
from etcdfs.tree.value_cache import ENTRY_OVERHEAD, ValueCache

CAPACITY = 4 * (ENTRY_OVERHEAD + 100)

_keys = st.sampled_from((b"a", b"b", b"c"))
_revisions = st.integers(1, 3).map(Revision)
_sizes = st.sampled_from((0, 1, 100, 101, 1000, CAPACITY - ENTRY_OVERHEAD))


class ValueCacheMachine(RuleBasedStateMachine):
    """Against a list of versions, oldest use first, that is added up anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.value_cache = ValueCache(CAPACITY)
        self.model: list[tuple[bytes, Revision, bytes]] = []
        self.hits = self.misses = self.evictions = 0

    def held(self, key: bytes, revision: Revision) -> bytes | None:
        """Take a version out of the model."""
        for i, (its_key, its_revision, _) in enumerate(self.model):
            if (its_key, its_revision) == (key, revision):
                return self.model.pop(i)[2]
        return None

    def size(self) -> int:
        return sum(ENTRY_OVERHEAD + len(value) for _, _, value in self.model)

    @rule(key=_keys, revision=_revisions, size=_sizes)
    def put(self, key: bytes, revision: Revision, size: int) -> None:
        # One version has one value, so putting it again puts the same one.
        held = self.held(key, revision)
        value = b"x" * size if held is None else held
        self.model.append((key, revision, value))
        self.value_cache.put(key, revision, value)
        while self.size() > CAPACITY:
            del self.model[0]
            self.evictions += 1

    @rule(key=_keys, revision=_revisions)
    def put_what_never_fits(self, key: bytes, revision: Revision) -> None:
        self.value_cache.put(key, revision, b"x" * (CAPACITY - ENTRY_OVERHEAD + 1))

    @precondition(lambda self: len(self.model) < 9)
    @rule(data=st.data(), size=_sizes)
    def put_if_room(self, data: st.DataObject, size: int) -> None:
        held = {(key, revision) for key, revision, _ in self.model}
        free = [(k, Revision(r)) for k in (b"a", b"b", b"c") for r in (1, 2, 3)]
        key, revision = data.draw(st.sampled_from([v for v in free if v not in held]))
        fits = self.size() + ENTRY_OVERHEAD + size <= CAPACITY
        assert self.value_cache.put_if_room(key, revision, b"y" * size) == fits
        if fits:
            self.model.append((key, revision, b"y" * size))

    @rule(key=_keys, revision=_revisions)
    def get(self, key: bytes, revision: Revision) -> None:
        value = self.held(key, revision)
        assert self.value_cache.get(key, revision) == value
        if value is None:
            self.misses += 1
        else:
            self.hits += 1
            self.model.append((key, revision, value))

    @rule(key=_keys, revision=_revisions)
    def discard(self, key: bytes, revision: Revision) -> None:
        self.held(key, revision)
        self.value_cache.discard(key, revision)

    @invariant()
    def counted(self) -> None:
        self.value_cache.check_invariants()
        statistics = self.value_cache.statistics()
        assert statistics.entries == len(self.model)
        assert statistics.size == self.size() <= statistics.capacity == CAPACITY
        assert statistics.hits == self.hits
        assert statistics.misses == self.misses
        assert statistics.evictions == self.evictions


TestValueCacheMachine = ValueCacheMachine.TestCase


def test_no_capacity_keeps_nothing() -> None:
    value_cache = ValueCache(0)
    value_cache.put(b"k", Revision(1), b"")
    assert not value_cache.put_if_room(b"k", Revision(1), b"")
    assert value_cache.get(b"k", Revision(1)) is None
    assert value_cache.statistics().evictions == 0


def test_an_empty_value_is_a_hit() -> None:
    value_cache = ValueCache(CAPACITY)
    value_cache.put(b"k", Revision(1), b"")
    assert value_cache.get(b"k", Revision(1)) == b""
    assert value_cache.statistics().hits == 1


def test_tiny_values_are_charged_for_what_they_really_take() -> None:
    value_cache = ValueCache(1_000_000)
    for revision in range(10_000):
        value_cache.put(b"k", Revision(revision), b"x")
    assert value_cache.statistics().entries == 1_000_000 // (ENTRY_OVERHEAD + 1)


def test_what_is_charged_pays_for_the_memory() -> None:
    count, revision = 22_000, Revision(123_456_789)  # just after the table has grown
    value_cache, keys = ValueCache(1 << 30), [b"/some/directory/%06d" % n for n in range(count)]
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for key in keys:
        value_cache.put(key, revision, bytes(100))
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert value_cache.statistics().size / 2 < taken <= value_cache.statistics().size
