"""TLS and passwords: how the two sides of a connection come to trust one another.

Knows: certificates, keys and password files, which it reads anew each time, so that they may be
rotated under a mount. Does not know: etcd's calls. It is part of the etcd door.

gRPC always verifies. `--insecure-skip-tls-verify` is therefore done by *pinning*: the member is
asked for its certificate, and then exactly that one is trusted, by the name it has, for one
connection. So whatever certificate a member shows is accepted, from anybody and for any name,
except an expired one: that gRPC refuses, and no option of its Python interface changes it.

Concurrency: what blocks (files, the question for a certificate) runs in a thread, bounded.
"""

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import trio

from etcdfs.errors import StoreLoginError, StoreTimeoutError, StoreTlsError, StoreUnavailableError
from etcdfs.options import Endpoint, Security

Credentials = Any
"""grpc.ChannelCredentials: it has no types. None: plain text."""

T = TypeVar("T")

ChannelOptions = tuple[tuple[str, str | int], ...]

_BUNDLES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Arch, Alpine
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora
    "/etc/ssl/ca-bundle.pem",  # openSUSE
)
"""Where systems keep the authorities they trust, should OpenSSL not say."""

_PASSWORD_MAX: Final = 64 * 1024
"""A file larger than that is not a password."""


async def credentials(
    security: Security, endpoint: Endpoint, timeout_s: float
) -> tuple[Credentials, ChannelOptions]:
    """Return what a new channel to a member is made with.

    Raises:
        StoreTlsError: A file is missing or of no use, or no trust can be had.
        StoreTimeoutError: A file, or the member's certificate, could not be read in time.
    """
    if not endpoint.secure:
        return None, ()
    return await _in_thread(partial(_credentials, security, endpoint, timeout_s), timeout_s)


async def password(security: Security, timeout_s: float) -> str:
    """Return the user's password, as it is now.

    Raises:
        StoreLoginError: It cannot be read.
        StoreTimeoutError: It could not be read in time.
    """
    if security.password_file is None:
        return security.password or ""
    return await _in_thread(partial(_read_password, security.password_file), timeout_s)


async def _in_thread(function: Callable[[], T], bound_s: float) -> T:
    """Run what may block for long, as files of a network file system may."""
    with trio.move_on_after(bound_s):
        return await trio.to_thread.run_sync(function, abandon_on_cancel=True)
    raise StoreTimeoutError("certificates or the password could not be read in time")


def _read_password(path: str) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_PASSWORD_MAX)
    except (OSError, UnicodeDecodeError) as exc:
        raise StoreLoginError(f"the password file {path}: {_why(exc)}") from exc
    return text.removesuffix("\n").removesuffix("\r")


# --- TLS ------------------------------------------------------------------------------------


def _credentials(
    security: Security, endpoint: Endpoint, timeout_s: float
) -> tuple[Credentials, ChannelOptions]:
    chain, key = _client_pair(security)
    name = security.server_name
    roots: bytes | None
    if security.skip_verify:
        roots, name = _pin(security, endpoint, timeout_s)
    else:
        roots = _roots(security)
    made = grpc.ssl_channel_credentials(roots, key, chain)
    return made, () if name is None else (("grpc.ssl_target_name_override", name),)


def _client_pair(security: Security) -> tuple[bytes | None, bytes | None]:
    """Return our certificate and its key, which belong together."""
    if security.cert is None or security.key is None:
        return None, None
    chain, key = _read("certificate", security.cert), _read("key", security.key)
    try:
        # gRPC would only say that no handshaker could be made. An encrypted key needs a
        # passphrase, for which nobody can be asked here.
        _anyone().load_cert_chain(security.cert, security.key, password=lambda: b"")
    except (OSError, ssl.SSLError, ValueError) as exc:
        raise StoreTlsError(
            f"the certificate {security.cert} and the key {security.key}"
            f" cannot be used together: {_why(exc)}"
        ) from exc
    return chain, key


def _roots(security: Security) -> bytes | None:
    """Return the authorities to trust; None: those that gRPC has with it."""
    if security.cacert is None:
        known = (ssl.get_default_verify_paths().cafile, *_BUNDLES)
        bundle = next((path for path in known if path and Path(path).is_file()), None)
        return None if bundle is None else Path(bundle).read_bytes()
    roots = _read("CA certificate", security.cacert)
    try:
        ssl.create_default_context(cafile=security.cacert)
    except (OSError, ssl.SSLError) as exc:
        raise StoreTlsError(f"the CA certificate {security.cacert}: {_why(exc)}") from exc
    return roots


def _read(what: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise StoreTlsError(f"the {what} {path}: {_why(exc)}") from exc


def _pin(security: Security, endpoint: Endpoint, timeout_s: float) -> tuple[bytes, str]:
    """Ask a member for its certificate; return it, and a name that it is for."""
    pem, certificate = _shown(security, endpoint, timeout_s)
    return pem.encode(), _name_of(certificate) or endpoint.host


def _shown(security: Security, endpoint: Endpoint, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Ask a member for its certificate; return it, and what is in it."""
    pem = ssl.DER_cert_to_PEM_cert(_handshake(_anyone(), security, endpoint, timeout_s)[0])
    strict = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    strict.check_hostname = False
    strict.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    strict.load_verify_locations(cadata=pem)
    # Once more, verified: only then does Python say what is in it.
    return pem, _handshake(strict, security, endpoint, timeout_s)[1]


def _anyone() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _handshake(
    context: ssl.SSLContext, security: Security, endpoint: Endpoint, timeout_s: float
) -> tuple[bytes, dict[str, Any]]:
    """Connect, agree, and hang up; return the member's certificate, whole and understood."""
    context.set_alpn_protocols(["h2"])
    if security.cert is not None and security.key is not None:
        context.load_cert_chain(security.cert, security.key, password=lambda: b"")
    try:
        with (
            socket.create_connection((endpoint.host, endpoint.port), timeout_s) as plain,
            context.wrap_socket(
                plain, server_hostname=security.server_name or endpoint.host
            ) as secured,
        ):
            return secured.getpeercert(binary_form=True) or b"", secured.getpeercert() or {}
    except (ConnectionResetError, ssl.SSLEOFError) as exc:
        raise StoreTlsError(f"{endpoint}: it does not speak TLS") from exc
    except ssl.SSLError as exc:
        why = "it does not speak TLS" if exc.reason == "WRONG_VERSION_NUMBER" else _why(exc)
        raise StoreTlsError(f"{endpoint}: {why}") from exc
    except OSError as exc:
        raise StoreUnavailableError(f"{endpoint}: {_why(exc).lower()}") from exc


def _name_of(certificate: dict[str, Any]) -> str | None:
    """Return a name that a certificate is for."""
    for kind, name in certificate.get("subjectAltName", ()):
        if kind in {"DNS", "IP Address"}:
            return str(name).replace("*", "any", 1)
    subject = dict(part[0] for part in certificate.get("subject", ()) if part)
    name = subject.get("commonName")
    return None if name is None else str(name)


def _why(failure: Exception) -> str:
    """Return the reason alone, without numbers and file names."""
    if isinstance(failure, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {failure.verify_message}"
    if isinstance(failure, ssl.SSLError):
        return str(failure.reason or failure).replace("_", " ").lower()
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror
    return str(failure)


async def check(security: Security, endpoints: tuple[Endpoint, ...], timeout_s: float) -> None:
    """Read everything once, before anybody is asked: what is missing here is not etcd's fault.

    Raises:
        StoreError: A file is missing or of no use.
    """
    if security.user is not None:
        await password(security, timeout_s)
    if any(endpoint.secure for endpoint in endpoints):
        await _in_thread(partial(_client_pair, security), timeout_s)
        if not security.skip_verify:
            await _in_thread(partial(_roots, security), timeout_s)


# --- until when -----------------------------------------------------------------------------


async def member_expiry(security: Security, endpoint: Endpoint, timeout_s: float) -> float:
    """Return when the certificate ends that a member shows, in seconds since the epoch.

    Raises:
        StoreError: It has ended, or the member shows none.
    """
    shown = await _in_thread(partial(_shown, security, endpoint, timeout_s), timeout_s)
    return ssl.cert_time_to_seconds(shown[1]["notAfter"])


async def own_expiries(security: Security, timeout_s: float) -> dict[str, float]:
    """Return when our own certificate and our authorities end, in seconds since the epoch.

    Raises:
        StoreError: A file is missing or of no use, or the certificate has ended.
    """
    return await _in_thread(partial(_own_expiries, security), timeout_s)


def _own_expiries(security: Security) -> dict[str, float]:
    found: dict[str, float] = {}
    if security.cert is not None and security.key is not None:
        _client_pair(security)
        shown = _shown_to_oneself(security.cert, security.key)
        found[f"the certificate {security.cert}"] = ssl.cert_time_to_seconds(shown["notAfter"])
    if security.cacert is not None:
        _roots(security)
        trusted = ssl.create_default_context(cafile=security.cacert).get_ca_certs()
        ends = [ssl.cert_time_to_seconds(str(each["notAfter"])) for each in trusted]
        if ends:
            found[f"the CA certificate {security.cacert}"] = min(ends)
    return found


def _shown_to_oneself(cert: str, key: str) -> dict[str, Any]:
    """Return what is in a client's certificate: Python says it to whom it is shown, and verified."""
    client, server = _anyone(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for side in (client, server):
        side.load_cert_chain(cert, key, password=lambda: b"")
    server.verify_mode = ssl.CERT_REQUIRED
    server.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    server.load_verify_locations(cert)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    asks, shows = server.wrap_bio(there, back, server_side=True), client.wrap_bio(back, there)
    try:
        for talking in (shows, asks) * 2:  # hello, hello back, the certificate, and it is read
            with suppress(ssl.SSLWantReadError):
                talking.do_handshake()
    except ssl.SSLError as exc:
        raise StoreTlsError(f"the certificate {cert}: {_why(exc)}") from exc
    return asks.getpeercert() or {}


def page_context(security: Security) -> ssl.SSLContext:
    """Return what a page of a member is asked for with, that gRPC trusts already; it may block."""
    context = _anyone()
    if security.cert is not None and security.key is not None:
        context.load_cert_chain(security.cert, security.key, password=lambda: b"")
    return context
