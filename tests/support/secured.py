"""Certificates and users for tests: an authority of our own, and an etcd that asks who is there.

Knows: trustme, and how etcd is told to ask. Does not know: how etcdfs answers.

Concurrency: plain blocking calls.
"""

import ssl
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, final

import trustme

from etcdfs.options import Endpoint
from tests.support.etcd_process import EtcdProcess, Secured

HOSTS: Final = ("127.0.0.1", "localhost")
EXPIRED: Final = datetime.now(UTC) - timedelta(days=1)

ROOT_PASSWORD: Final = "root of all"
TOKEN_TTL_S: Final = 1
"""Few seconds, so that tokens end while a test runs; etcd takes whole ones."""


@final
class Authority:
    """A certificate authority, and the files of what it issued.

    Attributes:
        home: The directory of the files.
        cacert: Its own certificate.
    """

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self._ca = trustme.CA()
        self.cacert = home / "ca.pem"
        self._ca.cert_pem.write_to_path(self.cacert)

    def issue(
        self,
        name: str,
        *hosts: str,
        common_name: str | None = None,
        not_after: datetime | None = None,
    ) -> tuple[Path, Path]:
        """Write a certificate for some hosts, and its key, over those of that name."""
        issued = self._ca.issue_cert(*hosts, common_name=common_name, not_after=not_after)
        cert, key = self.home / f"{name}.pem", self.home / f"{name}.key"
        cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return cert, key

    def secured(self, *hosts: str, ask_clients: bool = False) -> Secured:
        """Return what an etcd needs that shows a certificate for `hosts`, and may ask for one.

        etcdctl and etcdfs show the certificate `client`.
        """
        cert, key = self.issue("server", *(hosts or HOSTS))
        client_cert, client_key = self.issue("client", "client@example.com")
        context = ssl.create_default_context(cafile=str(self.cacert))
        context.check_hostname = not hosts
        context.load_cert_chain(client_cert, client_key)
        return Secured(
            server=(
                f"--cert-file={cert}",
                f"--key-file={key}",
                *(
                    (f"--trusted-ca-file={self.cacert}", "--client-cert-auth")
                    if ask_clients
                    else ()
                ),
            ),
            client=(
                f"--cacert={self.cacert}",
                f"--cert={client_cert}",
                f"--key={client_key}",
            ),
            context=context,
        )


def secure(endpoint: Endpoint) -> Endpoint:
    """Return the same address, reached by TLS."""
    return replace(endpoint, secure=True)


# --- users ----------------------------------------------------------------------------------


def short_tokens() -> tuple[str, ...]:
    """Return the options of an etcd whose tokens end soon when they are not used."""
    return ("--auth-token=simple", f"--auth-token-ttl={TOKEN_TTL_S}")


def add_user(etcd: EtcdProcess, user: str, password: str, *permissions: tuple[str, bytes]) -> None:
    """Add a user whose role may `read`, `write` or `readwrite` what is below some prefixes."""
    etcd.etcdctl("user", "add", f"{user}:{password}")
    etcd.etcdctl("role", "add", user)
    for kind, prefix in permissions:
        etcd.etcdctl("role", "grant-permission", "--prefix=true", user, kind, prefix)
    etcd.etcdctl("user", "grant-role", user, user)


def switch_users_on(etcd: EtcdProcess) -> None:
    """Have etcd let in nobody without a password; etcdctl is the root user from now on."""
    etcd.etcdctl("user", "add", f"root:{ROOT_PASSWORD}")
    etcd.etcdctl("user", "grant-role", "root", "root")
    etcd.etcdctl("auth", "enable")
    etcd.secured = replace(
        etcd.secured, client=(*etcd.secured.client, f"--user=root:{ROOT_PASSWORD}")
    )
