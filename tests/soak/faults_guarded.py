"""Faults of tokens and rights, on an etcd with authentication, with nobody writing meanwhile.

Tokens live two seconds there.

Concurrency: the conductor's thread.
"""

import errno
import os

from tests.soak import layout
from tests.soak.arena import ROLE, Arena, FaultError
from tests.soak.control import nap, until
from tests.soak.faults_single import check, errno_of
from tests.soak.table import fault

EXPIRY_S = 5.0


def change_both_ways(arena: Arena, value: bytes) -> None:
    """Write through a mount and around it; both must be seen."""
    mine = arena.author.path / "soak" / "mine"
    mine.write_bytes(value)
    found = arena.etcds.ask(lambda client: client.get(layout.key("mine")))
    check(found is not None and found.value == value, "what was written is not in etcd")
    revision = arena.etcds.ask(lambda client: client.put((layout.key("theirs"), value)))
    arena.reader.wait(revision)
    check((arena.reader.path / "soak" / "theirs").read_bytes() == value, "a change is not seen")


@fault("15", "tokens expire", "guarded", 15)
def expired(arena: Arena) -> None:
    """Nobody notices: the daemon logs in again, and the watch goes on without a gap."""
    for n in range(2):
        nap(EXPIRY_S)
        change_both_ways(arena, b"after %d" % n)


@fault("15", "etcd is restarted and has forgotten all tokens", "guarded", 15)
def forgotten(arena: Arena) -> None:
    """As when they expire; the watch is made again, and misses nothing."""
    arena.etcds.restart(arena.etcds.members[0])
    arena.recovered(15)
    change_both_ways(arena, b"restarted")


@fault("16", "the right to the keys is taken away", "guarded", 30)
def revoked(arena: Arena) -> None:
    """Writes are EACCES; what is in memory is not shown any more; all is back with the right."""
    change_both_ways(arena, b"allowed")
    file = arena.reader.path / "soak" / "theirs"
    arena.etcds.ctl("role", "revoke-permission", "--prefix=true", "app", "/")
    try:
        number = errno_of(lambda: (arena.author.path / "soak" / "mine").write_bytes(b"no"))
        check(number == errno.EACCES, f"not EACCES but {os.strerror(number)}")
        until(lambda: errno_of(file.read_bytes) != 0, "what is here is not shown", 20)
    finally:
        arena.etcds.ctl("role", "grant-permission", *ROLE)
    until(lambda: errno_of(file.read_bytes) == 0, "it is shown again", 30)
    found = arena.etcds.ask(lambda client: client.get(layout.key("mine")))
    check(found is not None and found.value == b"allowed", "a write that was refused is there")


@fault("14", "whoever mounts may not read", "guarded", 10)
def may_not_mount(arena: Arena) -> None:
    """There is no mount, and one line says why."""
    try:
        arena.mount("denied", arena.etcds.url, "--user", "nobody:known")
    except RuntimeError as exc:
        check("permission denied" in str(exc), f"it does not say why: {exc}")
        check("Traceback" not in str(exc), "a traceback for somebody's mistake")
    else:
        raise FaultError("it was mounted")


@fault("+", "a user who may only read", "guarded", 10)
def read_only_user(arena: Arena) -> None:
    """Reads everything; every change is EACCES."""
    guest = arena.mount("guest", arena.etcds.url, "--user", "guest:known")
    try:
        file = guest.path / "soak" / layout.SINGLE[0]
        before = file.read_bytes()
        for attempt in (
            lambda: file.write_bytes(b"x"),
            file.unlink,
            (guest.path / "soak" / "made").mkdir,
        ):
            number = errno_of(attempt)
            check(number == errno.EACCES, f"not EACCES but {os.strerror(number)}")
        check(file.read_bytes() == before, "a refused write is shown")
    finally:
        guest.close()
