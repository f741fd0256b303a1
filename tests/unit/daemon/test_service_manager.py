"""What a service manager is told, by one that only listens."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from etcdfs.daemon.signals import STATUS_S, ServiceManager, find_service_manager


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.setblocking(False)
        yield heard


def words(heard: socket.socket) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(heard.recv(4096))
        except BlockingIOError:
            return found


@pytest.mark.parametrize("abstract", [False, True])
def test_it_is_found_and_nobody_else_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind("" if abstract else str(tmp_path / "notify"))
        name = heard.getsockname()
        address = "@" + name[1:].decode() if abstract else name
        for variable, value in (("SOCKET", address), ("USEC", "1"), ("PID", str(os.getpid()))):
            monkeypatch.setenv(
                f"{'NOTIFY' if variable == 'SOCKET' else 'WATCHDOG'}_{variable}", value
            )
        find_service_manager().tell("READY=1", "STATUS=Mounted")
        assert heard.recv(4096) == b"READY=1\nSTATUS=Mounted"
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()


def test_one_that_is_gone_or_never_was_is_no_failure(tmp_path: Path) -> None:
    ServiceManager(str(tmp_path / "nobody"), 1).tell("READY=1")
    ServiceManager().reloading()


async def run_for(manager: ServiceManager, seconds: float, status: str, then: str = "") -> None:
    lines = [status]
    with trio.move_on_after(seconds / 2 if then else seconds):
        await manager.run(lambda: lines[0])
    if then:
        lines[0] = then
        with trio.move_on_after(seconds / 2):
            await manager.run(lambda: lines[0])


async def test_the_watchdog_is_fed_twice_as_often_as_it_wants(
    heard: socket.socket, autojump_clock: trio.testing.MockClock
) -> None:
    manager = ServiceManager(heard.getsockname(), watchdog_s=4)
    await run_for(manager, 9, "Revision 1", "Revision 2")
    assert words(heard) == [
        *(b"WATCHDOG=1\nSTATUS=Revision 1", b"WATCHDOG=1", b"WATCHDOG=1"),
        *(b"WATCHDOG=1\nSTATUS=Revision 2", b"WATCHDOG=1", b"WATCHDOG=1"),
    ]


async def test_without_a_watchdog_only_news_are_told(
    heard: socket.socket, autojump_clock: trio.testing.MockClock
) -> None:
    await run_for(ServiceManager(heard.getsockname()), 5 * STATUS_S, "Revision 1", "Revision 2")
    assert words(heard) == [b"STATUS=Revision 1", b"STATUS=Revision 2"]


async def test_without_a_manager_nothing_runs(autojump_clock: trio.testing.MockClock) -> None:
    with trio.fail_after(1):
        await ServiceManager(watchdog_s=1).run(lambda: "nobody wants to know")


@pytest.mark.parametrize(
    ("usec", "pid", "fed"),
    [("200000", "", True), ("200000", "1", False), ("0", "", False), ("soon", "", False)],
)
async def test_a_watchdog_that_waits_for_somebody_else(
    heard: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
    usec: str,
    pid: str,
    fed: bool,
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", heard.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", pid)
    await run_for(find_service_manager(), 1, "x")
    assert (b"WATCHDOG=1" in words(heard)) == fed


def test_a_reload_says_when_it_began(heard: socket.socket) -> None:
    ServiceManager(heard.getsockname()).reloading()
    (word,) = words(heard)
    begun, _, microseconds = word.decode().partition("\nMONOTONIC_USEC=")
    assert begun == "RELOADING=1"
    assert int(microseconds) > 0
