"""What `etcdfs status` makes of a status document; no mount is asked."""

import json
from typing import Any

import pytest

import etcdfs.cli.status
from etcdfs.cli.status import Answer, lines, show_status, state_of
from etcdfs.daemon.main import ServedComponents
from etcdfs.errors import NotAnsweringError
from etcdfs.mirror.state_machine import StateMachine
from etcdfs.options import MountOptions
from tests.support.fake_store import FakeStore


def document(*, cache: bool = True) -> dict[str, Any]:
    """Return the document of a mount, as it comes out of JSON."""
    made = ServedComponents(
        MountOptions(mountpoint="/mnt/\x1b[31m", cache=cache, prefix=b"/app/"), FakeStore()
    )
    if made.mirror is not None:
        made.mirror.state_machine = StateMachine(b"", b"")
    found: dict[str, Any] = json.loads(json.dumps(made.status.document()))
    return found


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """Return what the mounts answer from now on."""
    said: list[Answer] = []
    monkeypatch.setattr(etcdfs.cli.status, "ask", lambda _: said)
    return said


def show(mountpoint: str | None = "/mnt", *, as_json: bool = False) -> None:
    show_status(mountpoint, as_json=as_json, watch=False, interval_s=1)


@pytest.mark.parametrize("cache", [True, False])
async def test_each_line_has_something_to_say(cache: bool) -> None:
    shown = dict(lines(document(cache=cache)))
    assert all(shown.values())
    wanted = {"mount", "daemon", "prefix", "etcd", "state", "revision", "values", "requests"}
    wanted |= {"invalidations", "files", "inotify"}
    assert shown.keys() == (wanted | {"keys", "audits", "of attributes"} if cache else wanted)


async def test_a_snapshot_is_shown_with_what_is_wrong_with_it() -> None:
    found = document()
    kept = {"keys": 3, "revision": 7, "age_s": 90.0, "size": 2048, "offline": False, "error": ""}
    found["snapshot"] = kept
    assert dict(lines(found))["snapshot"] == "3 keys of revision 7, 1 min old; 2 KiB"
    found["snapshot"] = kept | {"offline": True, "error": "disk full"}
    said = dict(lines(found))["snapshot"]
    assert said.endswith("; shown, as etcd does not answer; it cannot be written: disk full")


async def test_requests_are_counted_and_then_per_second() -> None:
    before = document()
    before["requests"] = {"open": 10, "read": 5}
    assert dict(lines(before))["requests"] == "15 (open 10, read 5)"
    after = document()
    after["requests"] = {"open": 30, "read": 5}
    after["mount"]["uptime_s"] = before["mount"]["uptime_s"] + 10
    assert dict(lines(after, before))["requests"] == "2.0/s (open 2.0)"
    after["mount"]["uptime_s"] = before["mount"]["uptime_s"] - 1  # another daemon
    assert dict(lines(after, before))["requests"] == "35 (open 30, read 5)"


async def test_the_state_says_whether_the_mount_is_well() -> None:
    found = document()
    found["staleness"] |= {"connected": True, "state_s": 7200.0}
    assert state_of(found) == "connected for 2 h 0 min"
    found["staleness"] |= {"connected": False, "stale_s": 90.0}
    assert state_of(found) == "not connected for 2 h 0 min; shows what it had 1 min ago"
    found["staleness"]["refused"] = "etcd is away"
    assert state_of(found) == "shows nothing: etcd is away"


async def test_the_last_problem_is_shown_with_its_age() -> None:
    found = document()
    at = found["mount"]["started_at"] + found["mount"]["uptime_s"] - 180
    found["log"] = {"warnings": 2, "errors": 1, "last_problem": "lost", "last_problem_at": at}
    assert dict(lines(found))["last problem"].startswith("lost (3 min ago; 3 in all)")


async def test_no_text_of_a_mount_rules_the_terminal(
    answers: list[Answer], capsys: pytest.CaptureFixture[str]
) -> None:
    found = document()
    found["log"] |= {"last_problem": "[bold]\x1b[2J", "last_problem_at": 0.0}
    answers.append(Answer(mountpoint="/mnt/\x1b[31m", status=found))
    show()
    show(None)
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "[bold]\\x1b[2J" in said, "it is no markup either"


async def test_all_mounts_are_shown_and_one_that_fails_is_the_status(
    answers: list[Answer], capsys: pytest.CaptureFixture[str]
) -> None:
    answers += [
        Answer(mountpoint="/one", status=document()),
        Answer(mountpoint="/two", error="no answer"),
    ]
    with pytest.raises(NotAnsweringError, match="/two: no answer"):
        show(None)
    said = capsys.readouterr().out
    assert "/one" in said
    assert "no answer" in said
    with pytest.raises(NotAnsweringError):
        show(None, as_json=True)
    one, two = json.loads(capsys.readouterr().out)
    assert (one["mountpoint"], one["error"], two["status"]) == ("/one", "", None)
