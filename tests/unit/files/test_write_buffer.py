"""A write buffer against a list of bytes that remember where they came from."""

from hypothesis import given
from hypothesis import strategies as st

from etcdfs.files.write_buffer import Kind, WriteBuffer

_data = st.binary(max_size=5)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 12), _data),
        st.tuples(st.just("append"), st.just(0), _data),
        st.tuples(st.just("truncate"), st.integers(0, 12), st.just(b"")),
    ),
    max_size=8,
)


@given(base=_data, whole=st.booleans(), steps=_steps)
def test_bytes_and_kind(base: bytes, whole: bool, steps: list[tuple[str, int, bytes]]) -> None:
    buffer = WriteBuffer(base, whole=whole)
    old: list[int | None] = [] if whole else list(range(len(base)))
    content = b"" if whole else base
    for now, (what, number, data) in enumerate(steps):
        if what == "truncate":
            buffer.truncate(number, now)
            content = content[:number].ljust(number, b"\0")
            old = old[:number] + [None] * (number - len(old))
        else:
            append = what == "append"
            offset = len(content) if append else number
            end = buffer.end_of_write(number, len(data), append=append)
            buffer.write(number, data, append=append, now_ns=now)
            if data:
                assert len(buffer) == end
                content = content.ljust(offset, b"\0")
                old += [None] * (len(content) - len(old))
                content = content[:offset] + data + content[offset + len(data) :]
                old[offset : offset + len(data)] = [None] * len(data)
        assert buffer.value == content == buffer.read(0, 100)
        buffer.check_invariants()
    kept = old[: len(base)] == list(range(len(base)))
    match buffer.kind:
        case Kind.NONE:
            assert content == base
            assert kept
        case Kind.APPEND:
            assert kept
            assert base + buffer.tail == content
        case Kind.WHOLE:
            assert not any(number is not None for number in old)
        case Kind.PARTIAL:
            pass  # always safe


def test_sequential_overwrite_of_everything_is_whole() -> None:
    buffer = WriteBuffer(b"0123456789")
    buffer.write(0, b"abcd", append=False, now_ns=1)
    kinds = [buffer.kind]
    buffer.write(4, b"efghij", append=False, now_ns=2)
    kinds.append(buffer.kind)
    assert kinds == [Kind.PARTIAL, Kind.WHOLE]


def test_overwriting_everything_that_can_be_read_is_partial() -> None:
    """A counter that is read and written back: the other one's count must not be lost."""
    buffer = WriteBuffer(b"41")
    buffer.write(0, b"42", append=False, now_ns=1, blind=False)
    assert buffer.kind is Kind.PARTIAL


def test_only_appends_to_a_new_file_are_added() -> None:
    buffer = WriteBuffer(b"", whole=True)
    buffer.is_added = True
    buffer.write(0, b"a", append=True, now_ns=1)
    assert (buffer.kind, buffer.adds) == (Kind.WHOLE, True)
    buffer.write(1, b"b", append=False, now_ns=2)
    assert not buffer.adds


def test_gap_is_no_append() -> None:
    buffer = WriteBuffer(b"ab")
    buffer.write(4, b"c", append=False, now_ns=1)
    assert buffer.kind is Kind.PARTIAL
    assert buffer.value == b"ab\0\0c"


def test_writing_nothing_changes_nothing() -> None:
    buffer = WriteBuffer(b"ab")
    buffer.write(7, b"", append=False, now_ns=1)
    assert not buffer.is_dirty
    assert buffer.mtime_ns == 0


def test_truncation_says_that_a_refused_write_was_noticed() -> None:
    buffer = WriteBuffer(b"ab")
    buffer.is_torn = True
    buffer.truncate(2, 1)
    assert not buffer.is_torn
    assert buffer.kind is Kind.NONE


def test_published_as_it_is_now() -> None:
    buffer = WriteBuffer(b"", whole=True)
    buffer.write(0, b"ab", append=False, now_ns=1)
    buffer.tries.append((b"ab", b"ab"))
    buffer.written_back(b"ab")
    assert (buffer.kind, buffer.base, buffer.tries) == (Kind.NONE, b"ab", [])


def test_published_as_it_was_leaves_the_rest() -> None:
    buffer = WriteBuffer(b"a")
    buffer.write(0, b"b", append=True, now_ns=1)
    buffer.write(0, b"c", append=True, now_ns=1)
    buffer.written_back(b"ab")
    assert buffer.kind is Kind.APPEND
    assert buffer.tail == b"c"
    buffer.check_invariants()


def test_what_is_added_to_a_new_file_goes_on_being_added() -> None:
    buffer = WriteBuffer(b"", whole=True)
    buffer.is_added = True
    buffer.write(0, b"a", append=True, now_ns=1)
    buffer.write(0, b"b", append=True, now_ns=1)
    assert (buffer.kind, buffer.adds) == (Kind.WHOLE, True)
    buffer.written_back(b"a")
    assert (buffer.kind, buffer.adds, buffer.tail) == (Kind.APPEND, True, b"b")
    buffer.check_invariants()
