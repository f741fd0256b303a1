"""Leases, as the port `Store` describes them; part of the etcd door.

What this room knows: etcd's three calls about leases. What it must not know: connections.

All of them may be sent again: a grant that was carried out twice leaves a lease that nobody uses
and that ends by itself.

Concurrency: as `EtcdStore`.
"""

from typing import Any, Protocol

from aetcd import rpc

from etcdfs.errors import StoreError, StoreProtocolError

Message = Any
"""A generated protobuf message: `aetcd.rpc` has no types."""


class LeaseCalls(Protocol):
    """The part of `EtcdStore` that is about leases."""

    async def _lease(self, method: str, request: Message) -> Message:
        """Send a request to a method of etcd's service Lease, again after a lost connection."""
        ...

    async def lease_grant(self, ttl_s: int, lease: int = 0) -> int:
        """Make a lease; see the port."""
        answer = await self._lease("LeaseGrant", rpc.LeaseGrantRequest(TTL=ttl_s, ID=lease))
        if answer.ID <= 0 or answer.TTL <= 0:
            raise StoreProtocolError(f"etcd made no lease: {answer.error!r}")
        return int(answer.ID)

    async def lease_time_to_live(self, lease: int) -> int | None:
        """Return the seconds a lease has left; see the port."""
        answer = await self._lease("LeaseTimeToLive", rpc.LeaseTimeToLiveRequest(ID=lease))
        return int(answer.TTL) if answer.TTL >= 0 else None

    async def lease_has_keys(self, lease: int) -> bool:
        """Tell whether a lease holds any key; see the port."""
        request = rpc.LeaseTimeToLiveRequest(ID=lease, keys=True)
        return bool((await self._lease("LeaseTimeToLive", request)).keys)

    async def lease_revoke(self, lease: int) -> None:
        """End a lease; see the port."""
        try:
            await self._lease("LeaseRevoke", rpc.LeaseRevokeRequest(ID=lease))
        except StoreError as exc:
            if "lease not found" not in str(exc):
                raise
