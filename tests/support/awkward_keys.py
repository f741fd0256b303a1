"""Keys that are as awkward as keys can be, for Hypothesis."""

from hypothesis import strategies as st

from etcdfs.keyspace.keys import escape

_TOKENS = (b"%", b"=", b"+", b"%=", b"%+", b"%25", b"%00", b"%2", b"\0", b".", b"..")
_WORDS = (b"value", b"marker", b"%value", b"%marker", b".etcdfs", b"a", b"foo", b"\xff", b"\n")
_LENGTHS = (1, 2, 251, 252, 253, 254, 255, 256, 257, 505, 506, 507, 508, 509, 760)


def _fill(head: bytes, length: int) -> bytes:
    return head + b"x" * (length - len(head))


def _escaped_again(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    def pick(component: bytes, rest: bytes, *, at_root: bool, deepest: bool, which: int) -> bytes:
        whole = component + rest if deepest else component
        names = escape(whole, at_root=at_root, deepest=deepest)
        return names[which % len(names)]

    return st.builds(
        pick,
        inner,
        st.sampled_from((b"", b"/", b"//x", b"/%2F")),
        at_root=st.booleans(),
        deepest=st.booleans(),
        which=st.integers(0, 3),
    )


_runs = st.builds(
    lambda unit, n: unit * n,
    st.sampled_from((b"a", b"%", b"\0", b"\xff")),
    st.sampled_from(_LENGTHS),
)
_free = st.binary(max_size=4).map(lambda data: data.replace(b"/", b""))
_raw = st.lists(st.sampled_from(_TOKENS + _WORDS) | _runs | _free, max_size=4).map(b"".join)
_filled = st.builds(_fill, st.sampled_from(_TOKENS), st.sampled_from(_LENGTHS))

# Strategies are made once: making them anew for every draw costs more than drawing.
# Components, and names that one, two or three escapes in a row make of them.
components = _raw | _filled
for _ in range(3):
    components |= _escaped_again(components)
"""Parts of keys, between two slashes."""
