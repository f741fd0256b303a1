"""Whether the library of the fast path is there, and what follows when it is not."""

from types import SimpleNamespace
from typing import Any

import pytest

from etcdfs.errors import FuseRefusedError
from etcdfs.fuse import fastpath
from etcdfs.fuse.fastpath import NO_FAST_PATH, FastPath, Feature, fast_path_of
from etcdfs.options import MountOptions


class Library(SimpleNamespace):
    """What the library says, with a session that it has wrapped or has not."""

    def __init__(self, *, wraps: bool) -> None:
        super().__init__(wraps=wraps, in_use=0)

    def wrap_next_session(self, features: int) -> None:
        self.in_use = features if self.wraps else 0

    def features(self) -> int:
        return int(self.in_use)

    def flags(self) -> int:
        return 8

    def reader(self) -> int:
        return 7

    def forgo(self, features: int) -> None:
        self.in_use &= ~features


ALL = Feature.EXACT | Feature.NOFLUSH | Feature.LISTINGS


def test_what_is_wanted_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastpath, "_library", Library(wraps=True))
    fast_path = FastPath(ALL, required=True)
    fast_path.prepare()
    fast_path.check()
    assert fast_path.features == ALL
    assert (fast_path.keeps_listings, fast_path.flags) == (True, 8)


def test_without_listings_a_handle_says_what_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastpath, "_library", Library(wraps=True))
    fast_path = FastPath(Feature.EXACT)
    fast_path.prepare()
    assert (fast_path.keeps_listings, fast_path.flags) == (False, 8)


def test_a_mount_that_wants_none_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastpath, "_library", Library(wraps=True))
    NO_FAST_PATH.prepare()
    NO_FAST_PATH.check()
    assert not NO_FAST_PATH.features
    assert (NO_FAST_PATH.keeps_listings, NO_FAST_PATH.flags) == (False, None)


@pytest.mark.parametrize(
    ("library", "why_not", "said"),
    [
        (None, "no module", "no module"),
        (Library(wraps=False), "", "libfuse was not reached by way of it"),
    ],
)
def test_b97_what_cannot_be_had_is_said_once_or_refuses_the_mount(
    library: Library | None,
    why_not: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fastpath, "_library", library)
    monkeypatch.setattr(fastpath, "why_not", why_not)
    wished, required = FastPath(ALL), FastPath(ALL, required=True)
    wished.prepare()
    wished.check()
    assert [record.getMessage() for record in caplog.records] == [f"no fast path: {said}"]
    assert not wished.features
    assert (wished.keeps_listings, wished.flags) == (False, None)
    required.prepare()
    with pytest.raises(FuseRefusedError, match=f"--fast-path on: {said}"):
        required.check()


@pytest.mark.parametrize(
    ("may_look", "options", "wanted"),
    [
        (True, {"cache": True, "read_only": True}, True),
        (False, {"cache": True, "read_only": True}, False),
        (True, {"cache": True}, False),
        (True, {"read_only": True}, False),
        (True, {"cache": True, "read_only": True, "max_stale_s": 1.0}, False),
        (True, {"cache": True, "read_only": True, "consistency": "linearizable"}, False),
        (True, {"cache": True, "read_only": True, "kernel_timeout_s": 0.0}, False),
        (True, {"cache": True, "read_only": True, "fast_path": "off"}, False),
    ],
)
def test_files_are_opened_unseen_where_that_can_be_right(
    monkeypatch: pytest.MonkeyPatch, may_look: bool, options: dict[str, Any], wanted: bool
) -> None:
    monkeypatch.setattr(fastpath, "_library", Library(wraps=True))
    made = MountOptions(mountpoint="/mnt", endpoints=(), **options)
    fast_path = fast_path_of(made, may_look=may_look)
    fast_path.prepare()
    assert fast_path.opens_unseen == wanted
    assert fast_path.reader == (7 if wanted else None)
    fast_path.forgo(Feature.NO_OPEN)
    assert not fast_path.opens_unseen
    assert fast_path.reader is None


def test_without_the_library_a_file_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastpath, "_library", None)
    assert fastpath.look_at(-1) is fastpath.Use.SHARED
