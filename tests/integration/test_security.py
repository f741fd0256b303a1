"""TLS and users on a real etcd: who is trusted, who is not, and what is said about it."""

import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from etcdfs.errors import (
    StoreError,
    StoreLoginError,
    StorePermissionError,
    StoreTlsError,
    StoreUnavailableError,
    StoreUserError,
)
from etcdfs.etcd.client import EtcdStore, open_store
from etcdfs.keyspace.store import (
    END_OF_KEYS,
    Delete,
    Put,
    Transaction,
    WatchEvents,
    WatchOpened,
    range_end,
)
from etcdfs.options import OPEN, Security
from tests.support.etcd_process import EtcdProcess, find_etcds
from tests.support.secured import (
    EXPIRED,
    ROOT_PASSWORD,
    TOKEN_TTL_S,
    Authority,
    add_user,
    secure,
    short_tokens,
    switch_users_on,
)
from tests.support.store_contract import BOUND_S, Lab, StoreContract

pytestmark = [pytest.mark.etcd, pytest.mark.oldest_and_newest_etcd]

TIMEOUT_S = 10.0
SHORT_S = 1.0
PUT = Transaction(then=(Put(b"/a", b"1"),))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@asynccontextmanager
async def opened(
    etcd: EtcdProcess, security: Security, timeout_s: float = TIMEOUT_S
) -> AsyncIterator[EtcdStore]:
    """Open a store, by TLS if the etcd speaks it."""
    endpoint = replace(etcd.endpoint, secure=etcd.secured.context is not None)
    with trio.fail_after(BOUND_S):
        async with open_store([endpoint], timeout_s=timeout_s, security=security) as store:
            yield store


async def refused(etcd: EtcdProcess, security: Security, error: type[StoreError]) -> str:
    """Return what is said when a store cannot be opened."""
    with pytest.raises(error) as caught:
        async with opened(etcd, security, SHORT_S):
            pass
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(etcd.endpoint), "ETCD")


# --- TLS ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asking(authority: Authority, session_binary: Path) -> Iterator[EtcdProcess]:
    """An etcd that shows a certificate and wants to see one."""
    with EtcdProcess(session_binary, secured=authority.secured(ask_clients=True)) as etcd:
        yield etcd


@pytest.fixture(scope="module")
def elsewhere(
    tmp_path_factory: pytest.TempPathFactory, session_binary: Path
) -> Iterator[EtcdProcess]:
    """An etcd whose certificate is for another name, from another authority."""
    other = Authority(tmp_path_factory.mktemp("other"))
    with EtcdProcess(session_binary, secured=other.secured("etcd.example.com")) as etcd:
        yield etcd


@pytest.fixture(scope="module")
def session_binary() -> Path:
    return next(iter(find_etcds().values()))


@pytest.fixture
def trusting(authority: Authority) -> Security:
    home = authority.home
    return Security(
        cacert=str(authority.cacert), cert=str(home / "client.pem"), key=str(home / "client.key")
    )


def other_ca(etcd: EtcdProcess) -> str:
    """Return the file of the authority that an etcd's certificate comes from."""
    return next(o for o in etcd.secured.client if o.startswith("--cacert=")).partition("=")[2]


async def test_certificates_on_both_sides(asking: EtcdProcess, trusting: Security) -> None:
    async with opened(asking, trusting) as store:
        revision = (await store.commit(PUT)).revision
        async with store.watch(b"", END_OF_KEYS, revision) as watch:
            assert isinstance(await watch.receive(), WatchOpened)
            assert isinstance(await watch.receive(), WatchEvents)


async def test_without_our_certificate(asking: EtcdProcess, authority: Authority) -> None:
    # With TLS 1.3 it depends on who is quicker: etcd hears of it after the handshake.
    said = await refused(asking, Security(cacert=str(authority.cacert)), StoreUnavailableError)
    assert said in {
        "ETCD: it closed the connection at once",
        "ETCD: it does not accept our certificate, or wants one (--cert)",
    }


async def test_an_authority_that_is_not_ours(elsewhere: EtcdProcess, trusting: Security) -> None:
    said = await refused(elsewhere, replace(trusting, cert=None, key=None), StoreTlsError)
    assert said == "ETCD: its certificate is not trusted: unable to get local issuer certificate"


async def test_the_systems_authorities(elsewhere: EtcdProcess) -> None:
    said = await refused(elsewhere, OPEN, StoreTlsError)
    assert "not trusted" in said


async def test_a_certificate_for_another_name(elsewhere: EtcdProcess) -> None:
    trusting = Security(cacert=other_ca(elsewhere))
    said = await refused(elsewhere, trusting, StoreTlsError)
    assert said == "ETCD: its certificate is for another name"
    async with opened(elsewhere, replace(trusting, server_name="etcd.example.com")) as store:
        await store.commit(PUT)


async def test_verification_can_be_left_out(elsewhere: EtcdProcess) -> None:
    async with opened(elsewhere, Security(skip_verify=True)) as store:
        await store.commit(PUT)


async def test_verification_left_out_with_a_certificate_of_ours(
    asking: EtcdProcess, trusting: Security
) -> None:
    async with opened(asking, replace(trusting, cacert=None, skip_verify=True)) as store:
        await store.commit(PUT)


async def test_a_name_in_the_old_place_is_found(tmp_path: Path, session_binary: Path) -> None:
    """Certificates of old have no list of names; some even have none at all."""
    authority = Authority(tmp_path)
    for number, name in enumerate(("etcd", None)):
        secured = authority.secured()
        assert secured.context is not None
        secured.context.check_hostname = False
        secured.context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # the default from 3.13 on
        hosts = () if name else ("etcd@example.com",)
        authority.issue("server", *hosts, common_name=name)
        with EtcdProcess(session_binary, secured=secured) as etcd:
            if number:
                said = await refused(etcd, Security(skip_verify=True), StoreTlsError)
                assert said == "ETCD: its certificate is for another name"
                continue
            async with opened(etcd, Security(skip_verify=True)) as store:
                await store.commit(PUT)


async def test_plain_text_is_never_tried_instead(
    asking: EtcdProcess, trusting: Security, session_binary: Path
) -> None:
    with EtcdProcess(session_binary) as plain:
        plain.secured = asking.secured
        for security in (trusting, Security(skip_verify=True)):
            said = await refused(plain, security, StoreTlsError)
            assert said == "ETCD: it does not speak TLS"
        plain.secured = type(asking.secured)()


async def test_tls_is_not_tried_either(asking: EtcdProcess) -> None:
    with pytest.raises(StoreUnavailableError, match="closed the connection at once"):
        async with open_store([asking.endpoint], timeout_s=SHORT_S):
            pass


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"cacert": "/nowhere"}, "the CA certificate /nowhere: No such file or directory"),
        ({"cacert": "/dev/null"}, "the CA certificate /dev/null: "),
        ({"cert": "/nowhere"}, "the certificate /nowhere: No such file or directory"),
        ({"key": "/nowhere"}, "the key /nowhere: No such file or directory"),
        ({"key": "{home}/server.key"}, "cannot be used together: key values mismatch"),
        ({"key": "/dev/null"}, "cannot be used together: "),
    ],
)
async def test_files_of_no_use(
    asking: EtcdProcess,
    trusting: Security,
    authority: Authority,
    change: dict[str, str],
    complaint: str,
) -> None:
    change = {name: path.format(home=authority.home) for name, path in change.items()}
    said = await refused(asking, replace(trusting, **change), StoreTlsError)  # type: ignore[arg-type]
    assert complaint in said


async def test_certificates_are_rotated_under_a_store(tmp_path: Path, session_binary: Path) -> None:
    """Another authority altogether: what a connection is made with is read when it is made."""
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    with EtcdProcess(session_binary, secured=old.secured(ask_clients=True)) as etcd:
        use = tmp_path / "use"
        use.symlink_to(old.home)
        security = Security(
            cacert=str(use / "ca.pem"), cert=str(use / "client.pem"), key=str(use / "client.key")
        )
        async with opened(etcd, security) as store:
            revision = (await store.commit(PUT)).revision
            etcd.stop()
            etcd.secured = new.secured(ask_clients=True)
            etcd.start()
            # Nothing is trusted until the files here are changed, too.
            use.unlink()
            use.symlink_to(new.home)
            assert (await store.range(b"/a")).revision == revision
            await store.commit(PUT)


async def test_b90_a_connection_is_renewed_when_that_is_asked_for(
    asking: EtcdProcess, authority: Authority, tmp_path: Path
) -> None:
    """A certificate that is of no use leaves the connection alone; a good one replaces it."""
    authority.issue("client", "client@example.com")
    use = [tmp_path / "pem", tmp_path / "key"]
    security = Security(cacert=str(authority.cacert), cert=str(use[0]), key=str(use[1]))

    def take(home: Path) -> None:
        for path, name in zip(use, ("client.pem", "client.key"), strict=True):
            path.write_bytes((home / name).read_bytes())

    take(authority.home)
    stranger = Authority(tmp_path / "stranger")
    stranger.issue("client", "client@example.com")
    async with opened(asking, security, SHORT_S) as store:
        await store.commit(PUT)
        use[1].write_text("no key")
        with pytest.raises(StoreTlsError, match="cannot be used together"):
            await store.renew()
        take(stranger.home)
        with pytest.raises(StoreError):
            await store.renew()
        await store.commit(PUT)
        take(authority.home)
        await store.renew()
        await store.commit(PUT)


async def test_an_expired_certificate(tmp_path: Path, session_binary: Path) -> None:
    """Refused, even where verification is left out: gRPC insists."""
    authority = Authority(tmp_path)
    secured = authority.secured()
    authority.issue("server", "127.0.0.1", not_after=EXPIRED)
    assert secured.context is not None
    secured.context.check_hostname = False
    secured.context.verify_mode = 0  # type: ignore[assignment]
    with EtcdProcess(session_binary, secured=secured) as etcd:
        for security in (Security(cacert=str(authority.cacert)), Security(skip_verify=True)):
            said = await refused(etcd, security, StoreTlsError)
            assert said == "ETCD: its certificate is not trusted: certificate has expired"
        # A member that is given a new one is trusted again.
        authority.issue("server", "127.0.0.1")
        etcd.restart()
        async with opened(etcd, Security(cacert=str(authority.cacert))) as store:
            await store.commit(PUT)


# --- users ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(etcd_binary: Path) -> Iterator[EtcdProcess]:
    """An etcd with users: `app`, who has all below /app/, and `reader`, who may read there."""
    with EtcdProcess(etcd_binary, *short_tokens()) as etcd:
        add_user(etcd, "app", "secret", ("readwrite", b"/app/"))
        add_user(etcd, "reader", "other", ("read", b"/app/"))
        switch_users_on(etcd)
        yield etcd


APP = Security(user="app", password="secret")
APP_PUT = Transaction(then=(Put(b"/app/a", b"1"),))
APP_END = range_end(b"/app/")


async def test_a_user_and_what_it_may(guarded: EtcdProcess) -> None:
    async with opened(guarded, APP) as store:
        revision = (await store.commit(APP_PUT)).revision
        async with store.watch(b"/app/", APP_END, revision) as watch:
            assert isinstance(await watch.receive(), WatchOpened)
            assert isinstance(await watch.receive(), WatchEvents)
        # Of the releases 3.5.28 to 3.5.30 root alone may ask for it (etcd issue 21663).
        with suppress(StorePermissionError):
            assert (await store.status()).version
        with pytest.raises(StorePermissionError, match="permission denied"):
            await store.commit(PUT)
        with pytest.raises(StorePermissionError, match="permission denied"):
            await store.range(b"", END_OF_KEYS)
        with pytest.raises(StorePermissionError, match="permission denied"):
            async with store.watch(b"", END_OF_KEYS, 0) as watch:
                await watch.receive()


async def test_a_user_that_may_only_read(guarded: EtcdProcess) -> None:
    async with opened(guarded, Security(user="reader", password="other")) as store:
        await store.range(b"/app/", APP_END)
        with pytest.raises(StorePermissionError):
            await store.commit(APP_PUT)


@pytest.mark.parametrize(
    ("security", "error", "said"),
    [
        (OPEN, StoreUserError, "ETCD: etcdserver: user name is empty"),
        (
            Security(user="app", password="wrong"),
            StoreLoginError,
            "ETCD: the user 'app' is not let in: unknown, or the password is wrong",
        ),
        (
            Security(user="nobody", password=""),
            StoreLoginError,
            "ETCD: the user 'nobody' is not let in: unknown, or the password is wrong",
        ),
        (
            Security(user="app", password_file="/nowhere"),
            StoreLoginError,
            "the password file /nowhere: No such file or directory",
        ),
    ],
    ids=["nobody", "wrong", "unknown", "no file"],
)
async def test_who_is_not_let_in(
    guarded: EtcdProcess, security: Security, error: type[StoreError], said: str
) -> None:
    assert await refused(guarded, security, error) == said


async def test_a_token_that_expires_is_renewed(guarded: EtcdProcess) -> None:
    """Of both kinds of call, and of a watch that is opened long after."""
    async with opened(guarded, APP) as other, opened(guarded, APP) as store:
        revision = (await store.commit(APP_PUT)).revision
        async with store.watch(b"/app/", APP_END, 0) as standing:
            await standing.receive()
            await other.range(b"/app/a")
            await trio.sleep(TOKEN_TTL_S + 1.5)  # etcd looks at its tokens once a second
            await other.range(b"/app/a")
            await store.commit(APP_PUT)
            async with store.watch(b"/app/", APP_END, revision) as watch:
                assert isinstance(await watch.receive(), WatchOpened)
            assert isinstance(await standing.receive(), WatchEvents)


async def test_a_restarted_member_has_forgotten_its_tokens(guarded: EtcdProcess) -> None:
    async with opened(guarded, APP) as store:
        revision = (await store.commit(APP_PUT)).revision
        guarded.restart()
        assert (await store.commit(APP_PUT)).revision == revision + 1
        async with store.watch(b"/app/", APP_END, revision) as watch:
            assert isinstance(await watch.receive(), WatchOpened)


async def test_a_changed_password(guarded: EtcdProcess, tmp_path: Path) -> None:
    """Refused from then on, and let in again when the file here is changed, too."""
    file = tmp_path / "password"
    file.write_text("first\n")
    add_user(guarded, f"changing{guarded.pid}", "first", ("readwrite", b"/app/"))
    user = Security(user=f"changing{guarded.pid}", password_file=str(file))
    async with opened(guarded, user) as store:
        await store.commit(APP_PUT)
        guarded.etcdctl(
            "user", "passwd", "--interactive=false", f"changing{guarded.pid}", stdin=b"second\n"
        )
        for _ in range(2):
            with pytest.raises(StoreLoginError, match="is not let in"):
                await store.commit(APP_PUT)
        with pytest.raises(StoreLoginError):
            async with store.watch(b"/app/", APP_END, 0):
                pass
        file.write_text("second\n")
        await store.commit(APP_PUT)
        await store.range(b"/app/a")


async def test_a_renewed_connection_has_a_login_of_its_own(
    guarded: EtcdProcess, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text("word")
    add_user(guarded, f"renewing{guarded.pid}", "word", ("readwrite", b"/app/"))
    user = Security(user=f"renewing{guarded.pid}", password_file=str(file))
    async with opened(guarded, user) as store:
        await store.commit(APP_PUT)
        async with store.watch(b"/app/", APP_END, 0) as watch:
            assert isinstance(await watch.receive(), WatchOpened)
            file.write_text("another")
            with pytest.raises(StoreLoginError, match="is not let in"):
                await store.renew()
            revision = (await store.commit(APP_PUT)).revision
            file.write_text("word")
            await store.renew()
            await store.commit(APP_PUT)
            assert (await watch.receive()).revision == revision


async def test_a_role_that_changes_under_a_store(guarded: EtcdProcess) -> None:
    """The token is as good as before, only older than what etcd now knows of users."""
    async with opened(guarded, APP) as store:
        await store.commit(APP_PUT)
        guarded.etcdctl("role", "grant-permission", "--prefix=true", "app", "readwrite", "/more/")
        await store.commit(Transaction(then=(Put(b"/more/a", b""),)))
        guarded.etcdctl("role", "revoke-permission", "--prefix=true", "app", "/more/")
        with pytest.raises(StorePermissionError):
            await store.commit(Transaction(then=(Put(b"/more/a", b""),)))
        await store.commit(APP_PUT)


async def test_users_are_switched_on_under_a_store(etcd_binary: Path) -> None:
    """With a user, nothing is noticed; without, etcd says what it wants."""
    with EtcdProcess(etcd_binary) as etcd:
        add_user(etcd, "app", "secret", ("readwrite", b"/app/"))
        async with opened(etcd, APP) as store, opened(etcd, OPEN) as nobody:
            await store.commit(APP_PUT)
            await nobody.commit(APP_PUT)
            switch_users_on(etcd)
            await store.commit(APP_PUT)
            await store.range(b"/app/a")
            with pytest.raises(StorePermissionError, match="user name is empty"):
                await nobody.commit(APP_PUT)
            with pytest.raises(StorePermissionError):
                await nobody.range(b"/app/a")


# --- the contract ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(authority: Authority, session_binary: Path) -> Iterator[EtcdProcess]:
    """An etcd that asks for a certificate and for a user."""
    secured = authority.secured(ask_clients=True)
    with EtcdProcess(session_binary, *short_tokens(), secured=secured) as etcd:
        switch_users_on(etcd)
        yield etcd


class TestSecuredStore(StoreContract):
    """The port's contract once more, by TLS and with a token."""

    @pytest.fixture
    async def lab(self, both: EtcdProcess, trusting: Security) -> AsyncIterator[Lab]:
        security = replace(trusting, user="root", password=ROOT_PASSWORD)
        async with open_store(
            [secure(both.endpoint)], timeout_s=TIMEOUT_S, security=security
        ) as store:
            await store.commit(Transaction(then=(Delete(b"", END_OF_KEYS),)))

            async def compact(revision: int) -> None:
                await trio.to_thread.run_sync(both.etcdctl, "compact", str(revision))

            yield Lab(store=store, compact=compact)
