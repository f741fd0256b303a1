"""A cluster of real etcd members for tests, each of which can be killed, frozen or replaced.

Knows: how members find one another, and how to tell who leads. Does not know: etcdfs' own door, as
in `etcd_process`.

Nothing here polls: a member says by itself when it is ready, and a read that needs a quorum
returns when there is a leader.

Concurrency: plain blocking calls, each bounded; a trio test that must go on meanwhile wraps them
in `trio.to_thread.run_sync`. Only processes started here are ever signalled.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, final

from etcdfs.options import Endpoint
from tests.support.etcd_process import (
    PLAIN,
    EtcdProcess,
    EtcdProcessError,
    Seat,
    Secured,
    free_port,
)
from tests.support.wires import Wires

LEADER_TIMEOUT_S: Final = 30
"""How long an election may take on a busy machine."""

ELECTION_MS: Final = 1000
"""etcd's own default. A member is without a leader after up to twice that, and tells its watches
(`hasleader`) three times that later."""

_ELECTIONS: Final = 10
"""So often in turn a leader may be lost just after it was found."""

_PROBE: Final = "etcdfs-test-probe"
"""A key to ask for; it need not be there."""


@final
class Cluster:
    """Members of one etcd, all running. A context manager; owned by the test that made it.

    Attributes:
        members: Every member, by the order in which it was made; also those that are down.
    """

    def __init__(
        self,
        binary: Path,
        *arguments: str,
        size: int = 3,
        own: Mapping[int, Iterable[str]] | None = None,
        election_ms: int = ELECTION_MS,
        secured: Secured = PLAIN,
        wired: bool = False,
    ) -> None:
        """Start the members and wait until each of them answers.

        Args:
            binary: The etcd to run.
            arguments: Further command-line options of every member.
            size: How many.
            own: Further options of single members, by their number from 0 on.
            election_ms: How long a member waits for the leader's heartbeat.
            secured: How the members are reached, if not in plain text.
            wired: Whether they hear one another by wires that can be silenced (`cut_off`).

        Raises:
            EtcdProcessError: One did not start.
        """
        self._wires = Wires() if wired else None
        self._binary = binary
        self._arguments = (
            f"--heartbeat-interval={max(election_ms // 10, 1)}",
            f"--election-timeout={election_ms}",
            # Members may be changed at once, not only when all have been connected for 5 s.
            "--strict-reconfig-check=false",
            *arguments,
        )
        self._secured = secured
        self._made = 0
        self.members: list[EtcdProcess] = []
        own_urls = {f"m{number}": _peer_url() for number in range(size)}
        peer_urls = {name: self._wired(url) for name, url in own_urls.items()}
        cluster = ",".join(f"{name}={url}" for name, url in peer_urls.items())
        try:
            for number, (name, peer_url) in enumerate(peer_urls.items()):
                seat = Seat(
                    name=name,
                    endpoint=_client_address(),
                    peer_url=peer_url,
                    cluster=cluster,
                    listens_at=own_urls[name],
                )
                self._make(seat, *(own or {}).get(number, ()))
            self.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return the client addresses of all members, in their order."""
        return tuple(member.endpoint for member in self.members)

    @property
    def client_urls(self) -> str:
        """Return what `etcdctl --endpoints` and `etcdfs mount --endpoints` take."""
        return ",".join(member.client_url for member in self.members)

    @property
    def running(self) -> tuple[EtcdProcess, ...]:
        """Return the members that are neither down nor frozen."""
        return tuple(m for m in self.members if m.running and not m.paused)

    def start(self) -> None:
        """Start the members that are down, and wait until every one of them answers."""
        down = [member for member in self.members if not member.running]
        for member in down:
            member.spawn()
        for member in down:
            member.wait_until_ready()

    def heal(self) -> None:
        """Let frozen members go on, start those that are down, and wait for a leader.

        Those that were cut off hear the others again.
        """
        if self._wires is not None:
            self._wires.heal()
        for member in self.members:
            member.resume()
        self.start()
        self.leader()

    def cut_off(self, member: EtcdProcess, *, deaf_only: bool) -> None:
        """Keep a member from the others, not from its clients; the cluster must be wired.

        Args:
            member: The member, which runs.
            deaf_only: It does not hear the others, and they hear it.
        """
        assert self._wires is not None, "the cluster is not wired"
        ids = {m.peer_url: self.member_id(m) for m in self.members}
        self._wires.members.update(ids)
        own = ids[member.peer_url]
        others = set(ids.values()) - {own}
        self._wires.silenced |= {(other, own) for other in others}
        if not deaf_only:
            self._wires.silenced |= {(own, other) for other in others}

    def _wired(self, url: str) -> str:
        return url if self._wires is None else self._wires.to(int(url.rpartition(":")[2]))

    # --- who leads --------------------------------------------------------------------------

    def leader(self, *, besides: EtcdProcess | None = None) -> EtcdProcess:
        """Wait until there is a leader, and return it.

        Args:
            besides: Wait until it is another than this one, which must be down or frozen.

        Raises:
            EtcdProcessError: There is none in time: no majority runs.
        """
        asked = next(member for member in self.running if member is not besides)
        for _ in range(_ELECTIONS):
            # It returns when a leader has confirmed that it leads; until then etcdctl tries again.
            asked.etcdctl(f"--command-timeout={LEADER_TIMEOUT_S}s", "get", _PROBE)
            led_by = _status(asked).get("leader")
            if led_by is not None:
                break
        else:
            raise EtcdProcessError("each leader was gone at once")
        for member in self.running:
            if _status(member)["header"]["member_id"] == led_by:
                return member
        raise EtcdProcessError("the leader is none of the running members")

    def followers(self) -> tuple[EtcdProcess, ...]:
        """Return the running members that do not lead."""
        leader = self.leader()
        return tuple(member for member in self.running if member is not leader)

    def move_leader(self, to: EtcdProcess) -> None:
        """Have the leader hand over to another member, in order."""
        leader = self.leader()
        if leader is not to:
            leader.etcdctl("move-leader", f"{self.member_id(to):x}")

    def member_id(self, member: EtcdProcess) -> int:
        """Return the id by which etcd calls a running member."""
        return int(_status(member)["header"]["member_id"])

    # --- who belongs to it ------------------------------------------------------------------

    def add(self, *arguments: str, learner: bool = False) -> EtcdProcess:
        """Add a member, empty at first, and wait until it answers.

        Args:
            arguments: Further command-line options of its own.
            learner: It does not vote, and refuses linearizable reads and writes.
        """
        name, peer_url = f"m{self._made}", _peer_url()
        seats = [*self._seats(), f"{name}={peer_url}"]
        flags = ("--learner",) if learner else ()
        self.leader().etcdctl("member", "add", name, f"--peer-urls={peer_url}", *flags)
        member = self._make(
            Seat(
                name=name,
                endpoint=_client_address(),
                peer_url=peer_url,
                cluster=",".join(seats),
                state="existing",
            ),
            *arguments,
        )
        member.start()
        return member

    def remove(self, member: EtcdProcess) -> None:
        """Take a running member out of the cluster for good, its data too."""
        member_id = self.member_id(member)
        others = [m for m in self.running if m is not member]
        others[0].etcdctl("member", "remove", f"{member_id:x}")
        self.members.remove(member)
        member.close()

    def replace(self, member: EtcdProcess, *arguments: str) -> EtcdProcess:
        """Remove a running member and add an empty one in its place, at another address."""
        self.remove(member)
        return self.add(*arguments)

    def close(self) -> None:
        """Kill every member and delete its data."""
        with contextlib.ExitStack() as stack:
            if self._wires is not None:
                stack.callback(self._wires.close)
            for member in self.members:
                stack.callback(member.close)

    def _make(self, seat: Seat, *arguments: str) -> EtcdProcess:
        member = EtcdProcess(
            self._binary, *self._arguments, *arguments, seat=seat, secured=self._secured
        )
        self._made += 1
        self.members.append(member)
        return member

    def _seats(self) -> Iterator[str]:
        listed = json.loads(self.leader().etcdctl("member", "list", "--write-out=json"))
        for member in listed["members"]:
            yield f"{member['name']}={member['peerURLs'][0]}"


def _status(member: EtcdProcess) -> Any:
    """Return what a member says of itself, without asking the others."""
    answer = json.loads(member.etcdctl("endpoint", "status", "--write-out=json"))
    return answer[0]["Status"]


def _client_address() -> Endpoint:
    return Endpoint("127.0.0.1", free_port())


def _peer_url() -> str:
    return f"http://127.0.0.1:{free_port()}"
