"""How a person writes certificates and users, and the sentence that refuses a wrong one.

Knows: the options of TLS and of etcd's users, as text, and which of them go together. Does not
know: the files, which are read by whoever connects.

Concurrency: none; pure functions.
"""

from etcdfs.cli.option_values import OFF, ON, Texts, parse_fields, parse_flag
from etcdfs.errors import LoginError, TlsError
from etcdfs.options import Security


def asks_for_tls(texts: Texts) -> str | None:
    """Return the option that asks for TLS, whatever the endpoints say; None: none does."""
    asking = [f"--{name}" for name in ("cacert", "cert", "key", "server-name") if texts.get(name)]
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
    return Security(**{**parse_fields(Security, texts), "user": user, "password": password})


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
