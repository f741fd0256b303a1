"""The key-path mapping is total, injective, and leaves ordinary names alone."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from etcdfs.errors import InvalidRequestError, NameReservedError, NameTooLongError
from etcdfs.keyspace.keys import (
    MARKER_NAME,
    MAX_DEPTH,
    NAME_MAX,
    VALUE_NAME,
    Keyspace,
    Location,
    escape,
    is_part,
    is_plain,
)
from etcdfs.keyspace.store import END_OF_KEYS
from tests.support.awkward_keys import components

APP = Keyspace(b"/app/")
RAW = Keyspace(b"")

# --- strategies ----------------------------------------------------------------------------

_few = st.lists(components, min_size=1, max_size=4).map(b"/".join)
# Around the depth at which the rest of a key becomes one name.
_deep = st.builds(
    lambda head, depth, tail: (head + b"/") * depth + tail,
    st.sampled_from((b"a", b"", b".", b"%=%2F", b"x" * 255)),
    st.integers(MAX_DEPTH - 4, MAX_DEPTH + 1),
    _few,
)
rels = _few | _deep
keyspaces = st.sampled_from((APP, RAW, Keyspace(b"/")))


@st.composite
def located_keys(draw: st.DrawFn) -> tuple[Keyspace, bytes]:
    keyspace = draw(keyspaces)
    key = keyspace.prefix + draw(rels)
    assume(key)
    return keyspace, key


def _is_legal(name: bytes) -> bool:
    illegal = (b"", b".", b"..")
    return name not in illegal and len(name) <= NAME_MAX and not {0, ord("/")} & set(name)


# Paths that the kernel may ask for: legal file names, escapes and near misses.
_split = st.builds(
    lambda component, root, deepest: escape(component, at_root=root, deepest=deepest),
    components,
    st.booleans(),
    st.booleans(),
)
_single = components.filter(_is_legal).map(lambda name: (name,))
_few_names = st.lists(_split | _single, max_size=4).map(
    lambda groups: tuple(name for group in groups for name in group)
)
_deep_names = st.builds(
    lambda depth, names: (b"a",) * depth + names, st.integers(MAX_DEPTH - 4, MAX_DEPTH), _few_names
)
paths = _few_names | _deep_names


def _key_of(keyspace: Keyspace, location: Location) -> bytes:
    if location.is_marker:
        return keyspace.directory_prefix(location.names)
    return keyspace.file_key(location.names)


# --- the proof ------------------------------------------------------------------------------


@given(located_keys())
@example((RAW, b"/"))
@example((RAW, b"\0"))
@example((APP, b"/app/"))
@example((APP, b"/app//"))
@example((APP, b"/app/.etcdfs/x"))
@example((APP, b"/app/%=.etcdfs/x"))
@example((APP, b"/app/%=%25=.etcdfs"))
@example((APP, b"/app/a/" + b"x" * 253 + b"%"))
def test_every_key_has_a_path_of_legal_names_and_comes_back(case: tuple[Keyspace, bytes]) -> None:
    # locate is total, and having a left inverse it is injective.
    keyspace, key = case
    location = keyspace.locate(key)
    assert all(_is_legal(name) for name in location.names)
    assert _key_of(keyspace, location) == key
    assert key in keyspace


@given(located_keys(), rels)
def test_two_keys_have_two_paths(case: tuple[Keyspace, bytes], other: bytes) -> None:
    keyspace, key = case
    twin = keyspace.prefix + other
    assume(twin)
    assert (keyspace.locate(key) == keyspace.locate(twin)) == (key == twin)


@given(located_keys())
def test_no_path_ends_in_a_reserved_name_or_in_part_of_one(case: tuple[Keyspace, bytes]) -> None:
    keyspace, key = case
    names = keyspace.locate(key).names
    assert VALUE_NAME not in names
    assert MARKER_NAME not in names
    assert not names or not is_part(names[-1])
    assert names[:1] != (b".etcdfs",)


@given(keyspaces, paths)
@example(APP, (b"a", b"%="))
@example(APP, (b"%=%2E",))
@example(APP, (b"%=%", b"x"))
@example(RAW, (b"%=", b"a"))
@example(RAW, (b"%=",))
def test_every_path_that_can_be_created_has_one_key(
    keyspace: Keyspace, names: tuple[bytes, ...]
) -> None:
    try:
        key = keyspace.file_key(names)
    except (NameReservedError, InvalidRequestError, NameTooLongError):
        return
    location = keyspace.locate(key)
    if names[-1] == VALUE_NAME:
        assert location == (names[:-1], False)
    elif names[-1] == MARKER_NAME:
        assert location == (names[:-1], True)
    else:
        assert location == (names, False)


@given(keyspaces, paths)
def test_every_directory_has_one_prefix(keyspace: Keyspace, names: tuple[bytes, ...]) -> None:
    try:
        marker = keyspace.directory_prefix(names)
    except (NameReservedError, NameTooLongError):
        return
    if marker:
        assert keyspace.locate(marker) == (names, True)
    assert keyspace.locate(marker + b"x") == ((*names, b"x"), False)


@given(located_keys(), st.integers(min_value=0, max_value=8))
def test_what_is_below_a_directory_begins_with_its_scan_prefix(
    case: tuple[Keyspace, bytes], depth: int
) -> None:
    keyspace, key = case
    names = keyspace.locate(key).names
    assert key.startswith(keyspace.scan_prefix(names[: min(depth, max(len(names) - 1, 0))]))


@given(components.filter(_is_legal), st.integers(251, 600))
def test_any_ordinary_name_can_be_made_in_part_of_a_long_one(name: bytes, length: int) -> None:
    *above, _ = escape(b"x" * length + b"\0" * 90)
    assume(not name.startswith((b"%=", b"%+")) and escape(name) == (name,))
    key = APP.file_key((b"d", *above, name))
    assert APP.locate(key) == ((b"d", *above, name), False)
    assert key.startswith(APP.scan_prefix((b"d", *above)))


def test_parts_are_told_from_what_only_looks_like_one() -> None:
    APP.check_part((b"d", b"%+" + b"x" * 253))
    APP.check_part((b"d", b"%+" + b"x" * 251, b"%+%00" + b"x" * 250))
    for name in (b"%+" + b"x" * 251 + b"%2", b"%+" + b"%" * 253):
        with pytest.raises(NameReservedError):
            APP.check_part((b"d", name))


def test_the_scan_prefix_of_part_of_an_escape_stops_at_a_cut_percent() -> None:
    first = b"%+" + b"x" * 252 + b"%"
    assert APP.scan_prefix((b"d", first)) == b"/app/d/" + b"x" * 252
    assert APP.scan_prefix((b"d",)) == APP.directory_prefix((b"d",)) == b"/app/d/"


@given(components, st.booleans())
def test_a_plain_component_is_its_own_name(component: bytes, at_root: bool) -> None:
    if is_plain(component):
        assert escape(component, at_root=at_root) == (component,)


@given(components)
def test_a_name_is_escaped_only_if_it_must_be(component: bytes) -> None:
    # What is escaped is no file name, is reserved, or would be read as the escape of another.
    names = escape(component)
    if names != (component,) and _is_legal(component):
        assert (
            component in (VALUE_NAME, MARKER_NAME)
            or is_part(component)
            or (component.startswith(b"%=") and APP.file_key((b"d", component, b"f")) != b"")
        )


# --- by hand --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        b"foo", b"foo-bar", b"foo.conf", b"foo2", b".bashrc", b"...", b".etcdfs2", b"100%", b"%",
        b"%home%user%file", b"%=abc", b"%=%2E", b"%=%", b"%+", b"%+short", b"%values", b"%2F",
        b"\xff\xfe", b"a b\n", b"x" * 255, b"%+" + b"x" * 250, b"%=%25value2",
    ],
)  # fmt: skip
def test_ordinary_names_are_unchanged(name: bytes) -> None:
    for names in ((name,), (b"d", name), (name, b"f")):
        key = b"/app/" + b"/".join(names)
        assert APP.locate(key) == (names, False)
        assert APP.file_key(names) == key
        assert APP.directory_prefix(names) == key + b"/"


@pytest.mark.parametrize(
    ("component", "names"),
    [
        (b"", (b"%=",)),
        (b".", (b"%=.",)),
        (b"..", (b"%=..",)),
        (b"a\0b", (b"%=a%00b",)),
        (b"a\0%b", (b"%=a%00%25b",)),
        (b"%value", (b"%=%25value",)),
        (b"%marker", (b"%=%25marker",)),
        (b"%=", (b"%=%25=",)),
        (b"%=.", (b"%=%25=.",)),
        (b"%=%25=.", (b"%=%25=%2525=.",)),
        (b"%=%00", (b"%=%25=%2500",)),
        (b"%+" + b"x" * 253, (b"%+%25+" + b"x" * 249, b"%=xxxx")),
        (b"x" * 256, (b"%+" + b"x" * 253, b"%=xxx")),
        (b"x" * 506, (b"%+" + b"x" * 253, b"%=" + b"x" * 253)),
        (b"x" * 507, (b"%+" + b"x" * 253, b"%+" + b"x" * 253, b"%=x")),
        (b"\0" + b"x" * 250, (b"%=%00" + b"x" * 250,)),
        (b"\0" + b"x" * 251, (b"%+%00" + b"x" * 250, b"%=x")),
        (b"x" * 251 + b"%" * 5, (b"%+" + b"x" * 251, b"%=" + b"%25" * 5)),  # no %25 is cut through
        (b"x" * 252 + b"\0", (b"%+" + b"x" * 252, b"%=%00")),
        (b"x" * 253 + b"\0.%=x.R4nd0m", (b"%+" + b"x" * 253, b".%=x.R4nd0m")),
        (b"x" * 253 + b"\0" + b"y" * 255, (b"%+" + b"x" * 253, b"y" * 255)),
        (b"x" * 253 + b"\0" + b"y" * 256, (b"%+" + b"x" * 253, b"%+%00" + b"y" * 250, b"%=yyyyyy")),
        (b"x" * 253 + b"\0%=y", (b"%+" + b"x" * 253, b"%=%00%25=y")),
    ],
)
def test_the_escape_of(component: bytes, names: tuple[bytes, ...]) -> None:
    assert escape(component) == names
    assert APP.locate(b"/app/d/" + component + b"/f").names == (b"d", *names, b"f")
    assert APP.file_key((b"d", *names, b"f")) == b"/app/d/" + component + b"/f"


def test_the_control_name_is_reserved_at_the_root_only() -> None:
    assert APP.locate(b"/app/.etcdfs/x").names == (b"%=.etcdfs", b"x")
    assert APP.locate(b"/app/d/.etcdfs").names == (b"d", b".etcdfs")
    assert APP.locate(b"/app/%=.etcdfs").names == (b"%=%25=.etcdfs",)
    assert APP.locate(b"/app/d/%=.etcdfs").names == (b"d", b"%=.etcdfs")
    for names in ((b".etcdfs",), (b".etcdfs", b"x")):
        with pytest.raises(NameReservedError):
            APP.file_key(names)
        with pytest.raises(NameReservedError):
            APP.directory_prefix(names)


def test_value_and_marker_reach_the_keys_that_have_no_path_of_their_own() -> None:
    assert APP.file_key((b"a", b"%value")) == APP.file_key((b"a",)) == b"/app/a"
    assert APP.file_key((b"a", b"%marker")) == APP.directory_prefix((b"a",)) == b"/app/a/"
    assert APP.file_key((b"%marker",)) == APP.directory_prefix(()) == b"/app/"
    assert APP.locate(b"/app/") == ((), True)
    assert RAW.directory_prefix(()) == b""


@pytest.mark.parametrize(
    ("keyspace", "names"),
    [
        (APP, (b"%value",)),  # /app is outside of the prefix
        (RAW, (b"%marker",)),  # etcd has no empty key
        (APP, (b"a", b"%=")),  # a/ is the marker of a
        (APP, (b"a", b"%=", b"%value")),
        (APP, (b"a", b"%value", b"x")),
        (APP, (b"a", b"%marker", b"x")),
        (APP, (b"%+" + b"x" * 253,)),
        (APP, (b"%+" + b"x" * 253, b"%value")),
        (APP, (b"%+" + b"x" * 253, b"%marker")),
        (APP, (b"%+" + b"x" * 253, b"%=")),  # as long as one name can say
        (APP, (b"%+" + b"x" * 253, b"%=x")),  # 254 bytes need no escape
        (APP, (b"%+" + b"x" * 253, b"%=xxx%")),  # no encoding ends like that
    ],
)
def test_paths_that_stand_for_no_key(keyspace: Keyspace, names: tuple[bytes, ...]) -> None:
    with pytest.raises(NameReservedError):
        keyspace.file_key(names)


@pytest.mark.parametrize("names", [(), (b"",), (b".",), (b"a", b".."), (b"a/b",), (b"a\0",)])
def test_paths_that_no_kernel_sends(names: tuple[bytes, ...]) -> None:
    with pytest.raises(InvalidRequestError):
        APP.file_key(names)


def test_a_long_name_is_refused() -> None:
    with pytest.raises(NameTooLongError):
        APP.file_key((b"d", b"x" * 256))


def test_neighbours_are_not_inside_each_other() -> None:
    names = (b"foo", b"foo-bar", b"foo.conf", b"foo2")
    for name in names:
        assert APP.locate(b"/app/" + name).names == (name,)
    assert APP.locate(b"/app/foo/x").names == (b"foo", b"x")
    below = APP.directory_prefix((b"foo",))
    assert [name for name in names if (b"/app/" + name).startswith(below)] == []


@pytest.mark.parametrize("key", [b"", b"/", b"/app", b"/application", b"/app0", b"other"])
def test_the_prefix_ends_at_a_slash(key: bytes) -> None:
    assert key not in APP
    assert not APP.start <= key < APP.end
    with pytest.raises(ValueError, match="not under"):
        APP.locate(key)


def test_the_range_of_a_keyspace() -> None:
    assert (APP.start, APP.end) == (b"/app/", b"/app0")
    assert (RAW.start, RAW.end) == (b"\0", END_OF_KEYS)
    with pytest.raises(ValueError, match="slash"):
        Keyspace(b"/app")
    with pytest.raises(ValueError, match="not under"):
        RAW.locate(b"")


# --- deep keys ------------------------------------------------------------------------------


def test_what_is_below_the_deepest_directory_is_one_name() -> None:
    above = (b"a",) * (MAX_DEPTH - 1)
    stem = b"/app/" + b"a/" * (MAX_DEPTH - 1)
    assert APP.locate(stem + b"x") == (Location((*above, b"x"), is_marker=False))
    assert APP.locate(stem) == Location(above, is_marker=True)
    assert APP.locate(stem + b"x/y%") == Location((*above, b"%=x%2Fy%25"), is_marker=False)
    assert APP.locate(stem + b"x/") == Location((*above, b"%=x%2F"), is_marker=False)
    assert APP.locate(stem + b"%=x%2Fy") == Location((*above, b"%=%25=x%252Fy"), is_marker=False)
    assert [APP.is_deep(stem + rest) for rest in (b"x", b"x/", b"x/y")] == [False, True, True]


def test_no_path_is_deeper_than_the_deepest() -> None:
    above = (b"a",) * (MAX_DEPTH - 1)
    assert APP.directory_prefix(above) == b"/app/" + b"a/" * (MAX_DEPTH - 1)
    for names in ((*above, b"x"), (*above, b"x", b"y")):
        with pytest.raises(NameTooLongError):
            APP.directory_prefix(names)
    for names in ((*above, b"x", b"y"), (*above, b"x", VALUE_NAME), (*above, b"x", MARKER_NAME)):
        with pytest.raises(NameTooLongError):
            APP.file_key(names)


def test_a_key_of_a_million_slashes_has_few_names() -> None:
    location = APP.locate(b"/app/" + b"/" * 1_000_000)
    assert len(location.names) < MAX_DEPTH + 3 * 1_000_000 // 251 + 1
    assert _key_of(APP, location) == b"/app/" + b"/" * 1_000_000
