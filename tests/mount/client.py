"""Another client of the same etcd: plain JSON over HTTP, able to carry any bytes.

Knows: the few calls of etcd's JSON gateway that tests need
(https://etcd.io/docs/v3.5/dev-guide/api_grpc_gateway/). It shares no code with etcdfs, so that it
is a foreign writer and an independent witness; etcdctl cannot carry a NUL in a key.

Concurrency: plain blocking calls, each bounded; one owner per client (threads make their own).
"""

import base64
import http.client
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

from etcdfs.keyspace.store import range_end
from etcdfs.options import Endpoint

_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Found:
    """What etcd says of one key."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int


class ClientError(Exception):
    """etcd refused the request."""


@final
class Client:
    """A keep-alive connection to one etcd."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._connection = http.client.HTTPConnection(
            endpoint.host, endpoint.port, timeout=_TIMEOUT_S
        )

    def close(self) -> None:
        self._connection.close()

    def put(self, key: bytes, value: bytes) -> int:
        """Put a key; return the revision."""
        return _revision(self._call("kv/put", {"key": _out(key), "value": _out(value)}))

    def delete(self, key: bytes, end: bytes | None = None) -> int:
        """Delete a key or a range; return the revision."""
        body = {"key": _out(key)} | ({} if end is None else {"range_end": _out(end)})
        return _revision(self._call("kv/deleterange", body))

    def delete_below(self, prefix: bytes) -> int:
        """Delete every key with a prefix; return the revision."""
        return self.delete(prefix, range_end(prefix))

    def put_all(self, pairs: Iterable[tuple[bytes, bytes]]) -> int:
        """Put several keys in one transaction; return the revision."""
        puts = [{"request_put": {"key": _out(k), "value": _out(v)}} for k, v in pairs]
        return _revision(self._call("kv/txn", {"success": puts}))

    def change_all(self, puts: Iterable[tuple[bytes, bytes]], deletes: Iterable[bytes]) -> int:
        """Put and delete keys in one transaction; return the revision."""
        operations: list[dict[str, Any]] = [
            {"request_put": {"key": _out(k), "value": _out(v)}} for k, v in puts
        ]
        operations += [{"request_delete_range": {"key": _out(k)}} for k in deletes]
        return _revision(self._call("kv/txn", {"success": operations}))

    def get(self, key: bytes) -> Found | None:
        """Return a key, None if there is none."""
        found = self._range({"key": _out(key)})
        return found[0] if found else None

    def below(self, prefix: bytes) -> list[Found]:
        """Return every key with a prefix, in order."""
        return self._range({"key": _out(prefix or b"\0"), "range_end": _out(range_end(prefix))})

    def revision(self) -> int:
        """Return the revision of the store."""
        return _revision(self._call("kv/range", {"key": _out(b"\0")}))

    def compact(self, revision: int) -> None:
        """Drop history before a revision."""
        self._call("kv/compaction", {"revision": str(revision), "physical": True})

    @contextmanager
    def full(self) -> Iterator[None]:
        """Let etcd refuse every put for lack of space, as long as the body lasts."""
        alarm = {"memberID": "0", "alarm": "NOSPACE"}
        self._call("maintenance/alarm", {"action": "ACTIVATE", **alarm})
        try:
            yield
        finally:
            self._call("maintenance/alarm", {"action": "DEACTIVATE", **alarm})

    def _range(self, body: dict[str, Any]) -> list[Found]:
        return [_found(kv) for kv in self._call("kv/range", body).get("kvs", ())]

    def _call(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            self._connection.request("POST", f"/v3/{name}", json.dumps(body))
            answer = self._connection.getresponse()
            text = answer.read()
        except BaseException:
            self._connection.close()  # the next call opens a new one
            raise
        if answer.status != 200:
            raise ClientError(f"{name}: {answer.status} {text.decode(errors='replace')}")
        found: dict[str, Any] = json.loads(text)
        return found


def _out(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _found(kv: dict[str, Any]) -> Found:
    return Found(
        base64.b64decode(kv["key"]),
        base64.b64decode(kv.get("value", "")),
        int(kv["create_revision"]),
        int(kv["mod_revision"]),
        int(kv["version"]),
    )


def _revision(answer: dict[str, Any]) -> int:
    return int(answer["header"]["revision"])
