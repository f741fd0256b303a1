"""The mapping between etcd keys and the paths of the mount.

Knows: which name stands for which part of a key, and which names are reserved. Does not know: which
keys exist (that is the tree's), nor how a path is written as text.

A key under the mount's prefix is split at every `/` into *components*; a path is a tuple of
*names*. An ordinary component is its own name. The rest is escaped, so that every key has
exactly one path and every path that can be created has exactly one key:

====================================  =====================================================
component                             names
====================================  =====================================================
empty, `.`, `..`, has NUL             `%=` + text, where text has `%25` for `%`, `%00` for NUL
`.etcdfs` at the root                 `%=.etcdfs`
`%value`, `%marker`                   `%=%25value`, `%=%25marker`
the name of an escape                 escaped once more: `%=.` is shown as `%=%25=.`
text too long for one name            `%+` + up to 253 bytes of text, again and again, `%=` +
                                      the rest; or the rest as it is, if a NUL comes before it
what is deeper than `MAX_DEPTH`       with the last component above it, `%2F` for each `/`
====================================  =====================================================

"The name of an escape" is exact: `%=abc` stands for nothing that needs an escape, so it is an
ordinary name, and so is every other name with a `%` (`%home%me%file` of vim's undo directory).

A name that begins with `%+` and is so long is a directory, *part* of a long name, and no key says
that it is there. It is one like any other: programs write `.name.XXXXXX` beside what they replace.
So an ordinary name in it has a key as well, that of the text up to there, a NUL and the name.

A key that ends in `/` is the *marker* of a directory. Two reserved names reach what has no
path of its own: `a/%value` is the value of the key `a` when `a/b` is a key too, and `a/%marker`
is the value of the marker `a/` when it is not empty.

Record keys (`etcdfs.keyspace.attribute_records`) are attributes of other keys. They are no files, and have no path.

Concurrency: none; pure functions and frozen values.
"""

import re
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from etcdfs.errors import InvalidRequestError, NameReservedError, NameTooLongError
from etcdfs.keyspace.attribute_records import ATTRIBUTES, is_record_key
from etcdfs.keyspace.store import END_OF_KEYS, range_end

VALUE_NAME: Final = b"%value"
MARKER_NAME: Final = b"%marker"
CONTROL_NAME: Final = b".etcdfs"
NAME_MAX: Final = 255  # Linux: NAME_MAX of limits.h
MAX_DEPTH: Final = 256
"""Names that a path has at most, parts of long ones not counted. Below the last directory, the rest
of a key is one name. A key may have a million slashes, each of which would be a directory; a path of
ordinary names ends near this depth anyway (PATH_MAX)."""

_LAST: Final = b"%="  # begins the last, mostly the only, name of an escape
_PART: Final = b"%+"  # begins every earlier one
_NUL: Final = b"%00"  # in a text
_TEXT_MAX: Final = NAME_MAX - len(_LAST)
_JOINED_MAX: Final = len(_NUL) * (1 + NAME_MAX)  # of text: a NUL and a name
_DOT: Final = ord(".")
_SLASH: Final = ord("/")
_PERCENT: Final = ord("%")
_TEXT: Final = re.compile(rb"(?:[^%\0]|%25|%00)*", re.DOTALL)
_DEEPEST_TEXT: Final = re.compile(rb"(?:[^%\0]|%25|%00|%2F)*", re.DOTALL)


# A tuple and not a frozen dataclass: one is made per key while the keyspace is loaded, and the
# dataclass's __init__ alone costs as much as the rest of `locate`.
class Location(NamedTuple):
    """Where a key is shown.

    Attributes:
        names: The path. Of a marker: the path of its directory, `()` for the root.
        is_marker: Whether the key is the marker of the directory at `names`.
    """

    names: tuple[bytes, ...]
    is_marker: bool


def is_plain(component: bytes) -> bool:
    """Tell cheaply that a component is its own name, at any depth.

    False says nothing: ask `escape` or `Keyspace.locate`. A loader that gets keys in order
    keeps the directory of the last key and asks this of what follows the last `/`.
    """
    return (
        0 < len(component) <= NAME_MAX
        and component[0] not in (_DOT, _PERCENT)
        and 0 not in component
    )


def escape(component: bytes, *, at_root: bool = False, deepest: bool = False) -> tuple[bytes, ...]:
    """Return the names that stand for a component: mostly one, several if it is long.

    Args:
        component: Any bytes without `/`; with, if it is all that follows the deepest directory.
        at_root: Whether it is the first component below the prefix.
        deepest: Whether no directory can be there.
    """
    if not _needs_escape(component, at_root=at_root, deepest=deepest):
        return (component,)
    text = _encode(component)
    parts: list[bytes] = []
    start = 0
    while len(text) - start > _TEXT_MAX:
        end = _end_of_part(text, start)
        parts.append(_PART + text[start:end])
        start = end
        if text.startswith(_NUL, start) and len(text) - start <= _JOINED_MAX:
            name = _decode(text[start + len(_NUL) :])
            if _is_ordinary(name, deepest=deepest):
                return (*parts, name)
    return (*parts, _LAST + text[start:])


def is_part(name: bytes) -> bool:
    """Tell whether a name is a directory that holds the rest of a long escape, no more."""
    return name.startswith(_PART) and NAME_MAX - len(_NUL) < len(name) <= NAME_MAX


def has_keys_below(names: tuple[bytes, ...]) -> bool:
    """Tell whether a file may have keys below its own: if reserved, or too deep for directories."""
    return names[-1] in (VALUE_NAME, MARKER_NAME) or depth_of(names) == MAX_DEPTH


@dataclass(frozen=True, slots=True)
class Keyspace:
    """All keys under one prefix, and their paths.

    Attributes:
        prefix: Ends in `/`; or is empty, for the whole keyspace.
    """

    prefix: bytes
    start: bytes = field(init=False, repr=False, compare=False)
    end: bytes = field(init=False, repr=False, compare=False)
    _skip: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.prefix and not self.prefix.endswith(b"/"):
            raise ValueError(f"the prefix {self.prefix!r} does not end in a slash")
        # etcd has no empty key, so the first possible one is a single NUL.
        object.__setattr__(self, "start", self.prefix or b"\0")
        object.__setattr__(self, "end", range_end(self.prefix) if self.prefix else END_OF_KEYS)
        object.__setattr__(self, "_skip", len(self.prefix))

    def __contains__(self, key: bytes) -> bool:
        """Tell whether a key is under the prefix."""
        return key != b"" and key.startswith(self.prefix)

    @property
    def holds_records(self) -> bool:
        """Whether the record keys are among the keys under the prefix."""
        return ATTRIBUTES.startswith(self.prefix)

    def locate(self, key: bytes) -> Location:
        """Return the path at which a key is shown.

        Raises:
            ValueError: The key is not under the prefix.
        """
        if not key or not key.startswith(self.prefix):
            raise ValueError(f"the key {key!r} is not under {self.prefix!r}")
        rel = key[self._skip :]
        names = rel.split(b"/", MAX_DEPTH - 1)
        is_marker = not names[-1]
        if is_marker:
            names.pop()
        # The one test that most keys need: no component is special. It is short because all that
        # is special is empty or long, has a NUL, or begins with a dot or a percent, and what is
        # too deep is long. On `str`, because `in` on `bytes` costs five times as much.
        text = "/" + rel.decode("latin-1")
        if (
            len(rel) <= NAME_MAX
            and "/." not in text
            and "/%" not in text
            and "//" not in text
            and "\0" not in text
        ):
            return Location(tuple(names), is_marker)
        shown: list[bytes] = []
        for depth, component in enumerate(names, 1):
            shown += escape(component, at_root=not shown, deepest=depth == MAX_DEPTH)
        return Location(tuple(shown), is_marker)

    def is_deep(self, key: bytes) -> bool:
        """Tell whether part of a key is deeper than `MAX_DEPTH`, and shown as one name."""
        return key.count(b"/", self._skip) >= MAX_DEPTH

    def file_key(self, names: tuple[bytes, ...]) -> bytes:
        """Return the key whose value the file at a path holds.

        Raises:
            InvalidRequestError: The path is the root, or has a name that no file can have.
            NameTooLongError: A name has more than 255 bytes, or there are more than `MAX_DEPTH`.
            NameReservedError: The path stands for no key.
        """
        if not names:
            raise InvalidRequestError("the root is a directory and has no key of its own")
        *above, last = names
        if last == MARKER_NAME:
            return self._marker_key(tuple(above))
        if last == VALUE_NAME:
            components = _directory_components(tuple(above))
        else:
            components = _components(names)
        if not components:
            raise NameReservedError(f"the root has no {VALUE_NAME!r}")
        if not components[-1]:
            # The key would end in a slash, and is the marker of the directory above.
            raise NameReservedError(f"{names!r} can only be a directory")
        return _not_reserved(self.prefix + b"/".join(components))

    def directory_prefix(self, names: tuple[bytes, ...]) -> bytes:
        """Return what all keys below a directory begin with; it is also its marker key.

        The root of the whole keyspace has the empty prefix, and no marker.

        Raises:
            InvalidRequestError: A name is one that no file can have.
            NameTooLongError: A name has more than 255 bytes, or no directory can be so deep.
            NameReservedError: No key can be below that path, or it is part of a long escape.
        """
        components = _directory_components(names)
        return _not_reserved(self.prefix + b"".join(component + b"/" for component in components))

    def scan_prefix(self, names: tuple[bytes, ...]) -> bytes:
        """Return the longest known beginning of all keys below a directory.

        It is the `directory_prefix`, except in part of a long escape, where no `/` bounds it:
        some keys that begin with it may be elsewhere, and `locate` tells them apart.

        Raises:
            CallerError: As `directory_prefix`, except for parts of a long escape.
        """
        whole = len(names)
        while whole and is_part(names[whole - 1]):
            whole -= 1
        text = b"".join(name[len(_PART) :] for name in names[whole:])
        # Of a name that stands for nothing, the rest says nothing.
        known = _text(deepest=depth_of(names[:whole]) == MAX_DEPTH - 1).match(text)
        assert known is not None  # it matches the empty text
        return self.directory_prefix(names[:whole]) + _decode(known[0])

    def check_part(self, names: tuple[bytes, ...]) -> None:
        """Refuse a path whose last name looks like part of a long name, and is not.

        Raises:
            CallerError: No key can be below it.
        """
        self.file_key((*names, _LAST + _NUL))  # whatever the text, it may go on like this

    def _marker_key(self, names: tuple[bytes, ...]) -> bytes:
        key = self.directory_prefix(names)
        if not key:
            raise NameReservedError("the root of the whole keyspace has no marker")
        return key


def _not_reserved(key: bytes) -> bytes:
    if is_record_key(key):
        raise NameReservedError(f"{key!r} is kept for the attributes of other keys")
    return key


def depth_of(names: tuple[bytes, ...]) -> int:
    """Return how many components a path stands for; those of which it has parts only, not."""
    return sum(not is_part(name) for name in names)


def _needs_escape(component: bytes, *, at_root: bool, deepest: bool) -> bool:
    while True:
        if deepest and _SLASH in component:
            return True
        if is_plain(component):
            return False
        if not component or len(component) > NAME_MAX or 0 in component:
            return True
        if component[0] == _DOT:
            return component in (b".", b"..") or (at_root and component == CONTROL_NAME)
        if component in (VALUE_NAME, MARKER_NAME) or is_part(component):
            return True
        # What `escape` gives for something that needs it is escaped once more.
        text = component[len(_LAST) :]
        if not component.startswith(_LAST) or not _text(deepest=deepest).fullmatch(text):
            return False
        component = _decode(text)  # at least two bytes shorter, so that this ends


def _text(*, deepest: bool) -> re.Pattern[bytes]:
    return _DEEPEST_TEXT if deepest else _TEXT


def _is_ordinary(name: bytes, *, deepest: bool) -> bool:
    """Tell whether a name in part of a long name is no further piece of that."""
    is_piece = name.startswith((_LAST, _PART))
    return not is_piece and not _needs_escape(name, at_root=False, deepest=deepest)


def _end_of_part(text: bytes, start: int) -> int:
    """Return where the longest part of a text ends that cuts through no escape."""
    end = start + _TEXT_MAX
    return next((at for at in (end - 2, end - 1) if text[at] == _PERCENT), end)


def _encode(component: bytes) -> bytes:
    return component.replace(b"%", b"%25").replace(b"\0", _NUL).replace(b"/", b"%2F")


def _decode(text: bytes) -> bytes:
    # In this order: every other % is followed by 25, so a %00 can only be a NUL.
    return text.replace(b"%00", b"\0").replace(b"%2F", b"/").replace(b"%25", b"%")


def _components(names: tuple[bytes, ...]) -> list[bytes]:
    """Return the components that a path of ordinary and escaped names stands for."""
    components: list[bytes] = []
    pieces: list[bytes] = []
    for name in names:
        _check_name(name)
        if len(components) == MAX_DEPTH:
            raise NameTooLongError(f"the path has more than {MAX_DEPTH} names")
        pieces.append(name)
        if not is_part(name):
            deepest = len(components) == MAX_DEPTH - 1
            components.append(_unescape(pieces, at_root=not components, deepest=deepest))
            pieces.clear()
    if pieces:
        raise NameReservedError(f"{pieces[-1]!r} is only part of the name of a key")
    return components


def _directory_components(names: tuple[bytes, ...]) -> list[bytes]:
    components = _components(names)
    if len(components) == MAX_DEPTH:
        raise NameTooLongError(f"no directory can be {MAX_DEPTH} levels deep")
    return components


def _check_name(name: bytes) -> None:
    if len(name) > NAME_MAX:
        raise NameTooLongError(f"the name {name[:20]!r}... has {len(name)} bytes")
    if name in (b"", b".", b"..") or _SLASH in name or 0 in name:
        raise InvalidRequestError(f"{name!r} is no file name")


def _unescape(pieces: list[bytes], *, at_root: bool, deepest: bool) -> bytes:
    """Return the component that one whole name, or one whole split escape, stands for."""
    *parts, last = pieces
    if not parts and not _needs_escape(last, at_root=at_root, deepest=deepest):
        return last
    rest = last[len(_LAST) :] if last.startswith(_LAST) else _NUL + _encode(last)
    text = b"".join(part[len(_PART) :] for part in parts) + rest
    if _text(deepest=deepest).fullmatch(text):
        component = _decode(text)
        if escape(component, at_root=at_root, deepest=deepest) == tuple(pieces):
            return component
    raise NameReservedError(f"the name {last!r} is reserved or stands for no key")
