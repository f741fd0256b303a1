"""Faults of a cluster of three, each member in a network of its own, under load.

While one member is down, the mounts must go on with the others: so most of these check that they
equal etcd while the fault lasts, not only after it.

Concurrency: the conductor's thread.
"""

import signal
from collections.abc import Callable
from functools import partial
from typing import Final

from tests.soak import layout
from tests.soak.arena import Arena, FaultError
from tests.soak.control import nap, until
from tests.soak.etcds import Member, Network, member_ids
from tests.soak.faults_single import BACKOFF_S, KEEPALIVE_S, check, check_reads_go_on
from tests.soak.mounts import Mount
from tests.soak.raw import RawError
from tests.soak.table import fault

LEADERLESS_S: Final = 10.0
"""A member without a leader says so to those that ask for one (`hasleader`) after 3 elections."""

SILENT_S: Final = KEEPALIVE_S + 2 * BACKOFF_S


def in_use(arena: Arena, mount: Mount) -> Member:
    """Return the member that a mount's watch is at: the one that most is heard from."""
    before = mount.received()
    if arena.load is not None:
        arena.load.until_busy(10)
    heard = {peer: count - before.get(peer, 0) for peer, count in mount.received().items()}
    for member in sorted(arena.etcds.members, key=lambda m: -heard.get(m.endpoint, 0)):
        if heard.get(member.endpoint):
            return member
    raise FaultError(f"{mount.name} hears from nobody: {heard}")


def network(arena: Arena) -> Network:
    assert arena.etcds.network is not None
    return arena.etcds.network


def go_on_without(arena: Arena, bound_s: float) -> None:
    """Check that the mounts go on while a fault lasts."""
    check_reads_go_on(arena)
    arena.recovered(bound_s)


@fault("1", "kill -9 of the member in use, and restart", "cluster", 15)
def used_killed(arena: Arena) -> None:
    """The mount goes to another member and resumes there; then the first comes back."""
    member = in_use(arena, arena.reader)
    member.kill()
    go_on_without(arena, 15)
    arena.etcds.restart(member)


@fault("1", "kill -9 of the leader, and restart", "cluster", 15)
def leader_killed(arena: Arena) -> None:
    """Writes fail in bounded time or go on; none that was acknowledged is lost."""
    member = arena.etcds.leader()
    member.kill()
    go_on_without(arena, 20)
    arena.etcds.restart(member)


@fault("2", "SIGSTOP of the member in use, longer than keepalive", "cluster", 15)
def used_stopped(arena: Arena) -> None:
    """It is noticed by keepalive, and the mount goes to another member."""
    member = in_use(arena, arena.reader)
    member.signal(signal.SIGSTOP)
    try:
        go_on_without(arena, SILENT_S + 5)
    finally:
        member.signal(signal.SIGCONT)


@fault("4", "two of three members are down", "cluster", 20)
def quorum_lost(arena: Arena) -> None:
    """The watch is told that there is no leader within 10 s; nothing is read from what is left."""
    used = in_use(arena, arena.reader)
    others = [member for member in arena.etcds.members if member is not used]
    for member in others:
        member.kill()
    try:
        check_reads_go_on(arena)
        until(
            lambda: not arena.reader.statistics()["mirror"]["connected"],
            "the loss of the leader is noticed",
            LEADERLESS_S,
        )
    finally:
        for member in others:
            arena.etcds.start(member)
        arena.etcds.until_ready()


@fault("4", "the member in use is cut off from the others", "cluster", 15)
def used_cut_off(arena: Arena) -> None:
    """It says that it has no leader, and the mount goes to one that has."""
    _cut(arena, in_use(arena, arena.reader), both=True)


@fault("+", "an asymmetric partition: the member in use hears no other", "cluster", 15)
def used_deaf(arena: Arena) -> None:
    """As when it is cut off: what it sends still arrives, what it is sent does not."""
    _cut(arena, in_use(arena, arena.reader), both=False)


@fault("+", "an asymmetric partition: the leader hears no other", "cluster", 15)
def leader_deaf(arena: Arena) -> None:
    """Another is elected; the mount goes on, wherever it is."""
    _cut(arena, arena.etcds.leader(), both=False)


def _cut(arena: Arena, cut: Member, *, both: bool) -> None:
    wires = network(arena)
    others = [member for member in arena.etcds.members if member is not cut]
    wires.drop(cut.place, *(member.host for member in others))
    if both:
        for member in others:
            wires.drop(member.place, cut.host)
    try:
        go_on_without(arena, LEADERLESS_S + 2 * BACKOFF_S)
    finally:
        for member in arena.etcds.members:
            wires.heal(member.place)
    arena.etcds.until_ready()


@fault("3", "all packets to the member in use are dropped", "cluster", 15)
def used_unreachable(arena: Arena) -> None:
    """Noticed by keepalive; the mount goes to another member."""
    member = in_use(arena, arena.reader)
    network(arena).drop(member.place, network(arena).gateway)
    try:
        go_on_without(arena, SILENT_S + 5)
    finally:
        network(arena).heal(member.place)


@fault("+", "a third of all packets is lost", "cluster", 20)
def lossy(arena: Arena) -> None:
    """Slower, and nothing else."""
    for member in arena.etcds.members:
        share = "numgen random mod 100 < 30"
        network(arena).drop(member.place, network(arena).gateway, share=share)
    try:
        nap(5)
        check_reads_go_on(arena)
    finally:
        for member in arena.etcds.members:
            network(arena).heal(member.place)


@fault("5", "the leader changes under load", "cluster", 15)
def leader_moved(arena: Arena) -> None:
    """No acknowledged write is lost; one whose answer is lost is read back, not sent again."""
    for _ in range(4):
        leader = arena.etcds.leader()
        numbers = member_ids(arena.etcds)
        others = [name for name in numbers if name != leader.name]
        target = numbers[arena.chance.choice(others)]
        _eventually(partial(arena.etcds.raw(leader).move_leader, target))
        nap(0.5)


def _eventually(action: Callable[[], None]) -> None:
    def done() -> bool:
        try:
            action()
        except RawError:
            return False
        return True

    until(done, "etcd does it", 20)


@fault("+", "the member in use is replaced by a new one", "cluster", 20)
def member_replaced(arena: Arena) -> None:
    """The mount goes to another member, and may come back to the new one at the old address."""
    member = in_use(arena, arena.reader)
    arena.etcds.replace(member)
    check(len(member_ids(arena.etcds)) == 3, "the cluster has not three members")


@fault("+", "a learner is the first of the endpoints", "cluster", 15)
def learner_first(arena: Arena) -> None:
    """It serves no linearizable reads and no writes: it is passed over, and the mount works."""
    with arena.etcds.learner() as learner:
        mount = arena.mount("learning", f"{learner.url},{arena.etcds.url}")
        try:
            file = mount.path / "soak" / "learnt"
            file.write_bytes(b"ours")
            found = arena.etcds.ask(lambda client: client.get(layout.key("learnt")))
            check(found is not None and found.value == b"ours", "what was written is not in etcd")
            mount.wait(
                arena.etcds.ask(lambda client: client.put((layout.key("learnt"), b"theirs")))
            )
            check(file.read_bytes() == b"theirs", "a change is not seen")
        finally:
            mount.close()
    arena.etcds.ask(lambda client: client.delete(layout.key("learnt")))
