"""What many mounts cost a member of etcd, from simulated ones: `python -m benchmarks.watchers`.

A simulated mount is what a member sees of one: a connection with a watch of a prefix, and another
one for requests. They are on the member itself, or behind `etcd grpc-proxy`.

Concurrency: one thread, and those of gRPC.
"""

import argparse
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Final

import grpc
from aetcd import rpc

from tests.support.etcd_process import EtcdProcess, find_etcds
from tests.support.grpc_proxy import grpc_proxy

_OPTIONS: Final = (("grpc.use_local_subchannel_pool", 1),)  # a connection for each channel
_TIMEOUT_S: Final = 20.0
_KEY: Final = b"/watched/key"
_VALUE: Final = b"v" * 200


def measure(binary: Path, mounts: int, changes: int, *, proxied: bool) -> str:
    """Return a line of the table: memory, time and files of the member."""
    with EtcdProcess(binary) as etcd, ExitStack() as stack:
        url = stack.enter_context(grpc_proxy(binary, etcd) if proxied else nullcontext(""))
        target = url.removeprefix("http://") or str(etcd.endpoint)
        writer = rpc.KVStub(stack.enter_context(_channel(str(etcd.endpoint))))
        writer.Put(rpc.PutRequest(key=_KEY, value=_VALUE), timeout=_TIMEOUT_S)
        before = _memory(etcd.pid)
        ended = threading.Event()
        stack.callback(ended.set)
        watches = [_mount(stack, target, ended) for _ in range(mounts)]
        idle, files = _memory(etcd.pid), len(os.listdir(f"/proc/{etcd.pid}/fd"))
        used = _cpu_s(etcd.pid)
        for _ in range(changes):
            writer.Put(rpc.PutRequest(key=_KEY, value=_VALUE), timeout=_TIMEOUT_S)
            for watch in watches:
                next(watch)
        spent_ms = (_cpu_s(etcd.pid) - used) / changes * 1000
        return (
            f"{mounts:5} mounts{' by a proxy' if proxied else '':11}: {before:4.0f} MiB before, "
            f"{idle:4.0f} MiB idle, {_memory(etcd.pid):4.0f} MiB after {changes} changes, "
            f"{spent_ms:6.2f} ms of CPU for each, {files:5} files"
        )


def _mount(stack: ExitStack, target: str, ended: threading.Event) -> Any:
    """Connect as a mount does; return its watch."""

    def requests() -> Iterator[Any]:
        created = rpc.WatchCreateRequest(key=b"/watched/", range_end=b"/watched0")
        yield rpc.WatchRequest(create_request=created)
        ended.wait()

    request = rpc.RangeRequest(key=_KEY)
    rpc.KVStub(stack.enter_context(_channel(target))).Range(request, timeout=_TIMEOUT_S)
    stub = rpc.WatchStub(stack.enter_context(_channel(target)))
    watch = stub.Watch(requests(), metadata=(("hasleader", "true"),))
    next(watch)  # it is created
    return watch


def _channel(target: str) -> Any:
    return grpc.insecure_channel(target, options=_OPTIONS)


def _memory(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--etcd", default="", help="a release, as 3.5; the newest by default")
    parser.add_argument("--mounts", type=int, nargs="*", default=[0, 100, 400])
    parser.add_argument("--changes", type=int, default=50)
    given = parser.parse_args()
    found = [binary for version, binary in find_etcds().items() if version.startswith(given.etcd)]
    for proxied in (False, True):
        for mounts in given.mounts:
            print(measure(found[-1], mounts, given.changes, proxied=proxied), flush=True)


if __name__ == "__main__":
    main()
