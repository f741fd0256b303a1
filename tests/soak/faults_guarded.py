"""Faults of tokens and rights, on an etcd with authentication, with nobody writing meanwhile.

Tokens live two seconds there.

Concurrency: the conductor's thread.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from tests.soak import layout
from tests.soak.arena import ROLE, TENANTS_RECORDS, Arena, FaultError
from tests.soak.control import nap, until
from tests.soak.faults_single import check, errno_of
from tests.soak.mounts import Mount
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


@contextmanager
def tenant_of(arena: Arena) -> Iterator[Mount]:
    """Mount what a role reaches that has the keys and their attributes, and no others."""
    password = arena.home / "tenants-password"
    password.write_text("known")
    login = ("--user", "tenant", "--password-file", str(password))
    tenant = arena.mount("tenant", arena.etcds.url, "--prefix", layout.PREFIX, *login)
    try:
        yield tenant
    finally:
        tenant.close()


def make_secret(arena: Arena, name: str) -> int:
    """Make a file of mode 0600 through another mount; return its revision."""
    path = arena.author.path / "soak" / name
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    return int(os.getxattr(path, "user.etcd.mod_revision"))


def check_closed(tenant: Mount, *names: str) -> None:
    modes = {name: stat.S_IMODE((tenant.path / name).stat().st_mode) for name in names}
    check(set(modes.values()) == {0o600}, f"not all are closed: {modes}")


@fault("+", "the password is changed in etcd, and later in its file", "guarded", 40)
def password_changed(arena: Arena) -> None:
    """EACCES until the file has it; no secret is open meanwhile, or after, and all is as before."""
    make_secret(arena, "before")
    with tenant_of(arena) as tenant:
        check_closed(tenant, "before")
        arena.etcds.ctl("user", "passwd", "--interactive=false", "tenant", stdin="new\n")
        try:
            make_secret(arena, "during")
            number = errno_of(lambda: (tenant.path / "mine").write_bytes(b"no"))
            check(number == errno.EACCES, f"not EACCES but {os.strerror(number)}")
            (arena.home / "tenants-password").write_text("new")
            file = tenant.path / "mine"
            until(lambda: errno_of(lambda: file.write_bytes(b"yes")) == 0, "it is let in", 30)
            revision = make_secret(arena, "after")
            until(lambda: errno_of(lambda: tenant.wait(revision)) == 0, "it catches up", 30)
            check_closed(tenant, "before", "during", "after")
            (tenant.path / "mine").chmod(0o600)
        finally:
            arena.etcds.ctl("user", "passwd", "--interactive=false", "tenant", stdin="known\n")


@fault("+", "a role is narrowed, and widened again", "guarded", 40)
def role_narrowed_and_widened(arena: Arena) -> None:
    """What it does not reach is closed; then each file is as its owner wants it."""
    make_secret(arena, "before")
    with tenant_of(arena) as tenant:
        (tenant.path / "open").write_bytes(b"open")
        arena.etcds.ctl("role", "revoke-permission", "--prefix=true", "tenant", TENANTS_RECORDS[-1])
        try:
            tenant.wait(make_secret(arena, "during"))
            check_closed(tenant, "before", "during", "open")
            (tenant.path / "open").write_bytes(b"still open")
        finally:
            arena.etcds.ctl("role", "grant-permission", *TENANTS_RECORDS)
        file = tenant.path / "open"
        until(lambda: stat.S_IMODE(file.stat().st_mode) == 0o644, "what was open is open", 30)
        tenant.wait(make_secret(arena, "after"))
        check_closed(tenant, "before", "during", "after")


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
