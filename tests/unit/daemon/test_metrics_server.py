"""The metrics by HTTP: what is answered, and that nobody holds it up."""

import errno
import http.client
import socket
from collections.abc import AsyncIterator
from http import HTTPStatus

import pytest
import trio

from etcdfs.daemon.metrics_server import CLIENTS_MAX, Page, serving_metrics
from etcdfs.errors import MetricsAddressError


def page() -> Page:
    trio.lowlevel.current_trio_token()  # there is none on other threads
    return HTTPStatus.OK, b"etcdfs_connected 1\n"


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with serving_metrics(("127.0.0.1", 0), {"/metrics": page}) as found:
        yield found


def get(port: int, path: str = "/metrics") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


async def test_a_page_is_made_on_the_trio_thread(port: int) -> None:
    assert await trio.to_thread.run_sync(get, port) == (200, b"etcdfs_connected 1\n")
    assert await trio.to_thread.run_sync(get, port, "/metrics?x=1") == (
        200,
        b"etcdfs_connected 1\n",
    )


async def test_there_are_no_other_pages(port: int) -> None:
    status, _ = await trio.to_thread.run_sync(get, port, "/")
    assert status == 404


async def test_clients_that_say_nothing_hold_up_nobody_and_are_bounded(port: int) -> None:
    assert (await trio.to_thread.run_sync(get, port))[0] == 200, "its thread has begun"
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(CLIENTS_MAX - 1)]
    try:
        assert (await trio.to_thread.run_sync(get, port))[0] == 200
        silent += [socket.create_connection(("127.0.0.1", port)) for _ in range(CLIENTS_MAX)]
        closed = await trio.to_thread.run_sync(silent[-1].recv, 1)
        assert closed == b"", "one too many is closed at once"
    finally:
        for each in silent:
            each.close()


async def test_an_address_that_is_taken_is_one_line(port: int) -> None:
    with pytest.raises(MetricsAddressError, match=f"nobody can listen on 127.0.0.1:{port}: "):
        async with serving_metrics(("127.0.0.1", port), {}):
            pytest.fail(f"it listened twice: {errno.EADDRINUSE}")
