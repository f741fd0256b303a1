"""etcd without etcdfs: keys put in bulk, and the bare paged Range that a mount is compared with.

Knows: aetcd's generated stubs on a blocking gRPC channel. Does not know: etcdfs' own door to etcd;
a yardstick must not be made of what it measures.

Concurrency: plain blocking calls, each bounded.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import grpc
from aetcd import rpc

from etcdfs.options import Endpoint
from tests.support.etcd_process import EtcdProcess

PAGE: Final = 5000
"""Keys per Range, as the mirror's first listing asks for."""

PUTS_AT_ONCE: Final = 2000
"""Puts per transaction; of values of 200 bytes it stays well below etcd's 1.5 MiB a request."""

ETCD_ARGUMENTS: Final = (f"--max-txn-ops={PUTS_AT_ONCE}",)
"""What an etcd that is filled by `fill` must be started with."""

_TIMEOUT_S: Final = 30.0
_ATTEMPTS: Final = 3
_CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)


def prefix_end(prefix: bytes) -> bytes:
    """Return the end of the range of all keys that begin with a prefix such as `/a/`."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def fill(endpoint: Endpoint, pairs: Iterable[tuple[bytes, bytes]]) -> int:
    """Put keys, many in each transaction; return the last revision."""
    revision = 0
    with _kv(endpoint) as kv:
        for chunk in _chunks(pairs):
            puts = [
                rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value))
                for key, value in chunk
            ]
            answer = kv.Txn(rpc.TxnRequest(success=puts), timeout=_TIMEOUT_S)
            revision = answer.header.revision
    return revision


def put_one_by_one(endpoint: Endpoint, pairs: Iterable[tuple[bytes, bytes]]) -> int:
    """Put keys, each in a revision of its own; return the last one."""
    revision = 0
    with _kv(endpoint) as kv:
        for key, value in pairs:
            answer = kv.Put(rpc.PutRequest(key=key, value=value), timeout=_TIMEOUT_S)
            revision = answer.header.revision
    return revision


def read_all(endpoint: Endpoint, prefix: bytes) -> dict[bytes, bytes]:
    """Return every key below a prefix and its value, as of one revision, in pages."""
    found: dict[bytes, bytes] = {}
    start, end, revision, more = prefix, prefix_end(prefix), 0, True
    with _kv(endpoint) as kv:
        while more:
            page = kv.Range(
                rpc.RangeRequest(key=start, range_end=end, limit=PAGE, revision=revision),
                timeout=_TIMEOUT_S,
            )
            revision = revision or page.header.revision
            for entry in page.kvs:
                found[entry.key] = entry.value
            more = page.more
            if more:
                start = page.kvs[-1].key + b"\0"
    return found


def delete_all(endpoint: Endpoint, prefix: bytes) -> int:
    """Delete every key below a prefix in one revision; return that, or a later one."""
    request = rpc.DeleteRangeRequest(key=prefix, range_end=prefix_end(prefix))
    with _kv(endpoint) as kv:
        # A busy etcd goes on with what takes too long, but gives no answer to it.
        for _ in range(_ATTEMPTS - 1):
            with suppress(grpc.RpcError):
                return int(kv.DeleteRange(request, timeout=_TIMEOUT_S).header.revision)
        return int(kv.DeleteRange(request, timeout=_TIMEOUT_S).header.revision)


def etcdctl_command(etcd: EtcdProcess) -> list[str]:
    """Return how etcdctl is run: the binary, and not the script that a Python package has for it.

    Raises:
        FileNotFoundError: There is none.
    """
    beside = os.path.dirname(os.readlink(f"/proc/{etcd.pid}/exe"))
    for directory in (beside, *os.get_exec_path()):
        path = os.path.join(directory, "etcdctl")
        if os.access(path, os.X_OK) and not _is_script(path):
            return [path, f"--endpoints={etcd.client_url}", f"--command-timeout={_TIMEOUT_S:.0f}s"]
    raise FileNotFoundError("there is no etcdctl")


def _is_script(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"#!"


@contextmanager
def _kv(endpoint: Endpoint) -> Iterator[Any]:
    with grpc.insecure_channel(str(endpoint), options=_CHANNEL_OPTIONS) as channel:
        yield rpc.KVStub(channel)


def _chunks(pairs: Iterable[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    iterator = iter(pairs)
    while chunk := list(itertools.islice(iterator, PUTS_AT_ONCE)):
        yield chunk
