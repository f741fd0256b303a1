"""How a person writes certificates and users, and the sentence that refuses a wrong one.

What this room knows: the options of TLS and of etcd's users, as text, and which of them go
together. What it must not know: the files, which are read by whoever connects.

Concurrency: none; pure functions.
"""

from collections.abc import Mapping
from typing import Final

from etcdfs.errors import LoginError, TlsError, UsageError
from etcdfs.options import Security

Texts = Mapping[str, str]
"""Options by their name, the long flag of the command line without its dashes."""

ON: Final = "on"
OFF: Final = "off"

TLS_FILES: Final = ("cacert", "cert", "key")
FILES: Final = (*TLS_FILES, "password-file")
"""Options that name a file."""

SECURITY: Final = frozenset(
    {*FILES, "insecure-skip-tls-verify", "insecure-transport", "server-name", "user", "password"}
)
"""Every option that is read here; `password` has no flag, so that nobody writes one into `ps`."""


def parse_flag(text: str) -> bool:
    """Read `on` or `off` (also true/false, yes/no, 1/0), as environments have it.

    Raises:
        UsageError: It is neither.
    """
    match text.lower():
        case "on" | "true" | "yes" | "1":
            return True
        case "off" | "false" | "no" | "0":
            return False
        case _:
            raise UsageError(f"{text!r} is neither on nor off")


def asks_for_tls(texts: Texts) -> str | None:
    """Return the option that asks for TLS, whatever the endpoints say; None: none does."""
    asking = [f"--{name}" for name in (*TLS_FILES, "server-name") if texts.get(name)]
    if asking:
        return asking[0]
    if parse_flag(texts.get("insecure-skip-tls-verify", OFF)):
        return "--insecure-skip-tls-verify"
    if not parse_flag(texts.get("insecure-transport", ON)):
        return "--no-insecure-transport"
    return None


def read_security(texts: Texts) -> Security:
    """Put together what is said about certificates and the user.

    Raises:
        TlsError: What is said about certificates contradicts itself.
        LoginError: What is said about the user does.
        UsageError: One of the texts cannot be understood.
    """
    cert, key = texts.get("cert") or None, texts.get("key") or None
    if (cert is None) != (key is None):
        said, missing = ("--cert", "--key") if key is None else ("--key", "--cert")
        raise TlsError(f"{said} is of no use without {missing}")
    user, password = _user(texts)
    return Security(
        cacert=texts.get("cacert") or None,
        cert=cert,
        key=key,
        skip_verify=parse_flag(texts.get("insecure-skip-tls-verify", OFF)),
        server_name=texts.get("server-name") or None,
        user=user,
        password=password,
        password_file=texts.get("password-file") or None,
    )


def _user(texts: Texts) -> tuple[str | None, str | None]:
    """Return the user and the password, one of which may stand in the other's option."""
    name, colon, inline = texts.get("user", "").partition(":")
    said = texts.get("password")
    if not name:
        if colon or said is not None or texts.get("password-file"):
            raise LoginError("a password is of no use without --user")
        return None, None
    ways = [w for w in (colon or None, said, texts.get("password-file") or None) if w is not None]
    if len(ways) > 1:
        raise LoginError("the password is said in more than one way")
    if not ways:
        raise LoginError(f"the user {name!r} has no password: say --password-file FILE")
    return name, inline if colon else said
