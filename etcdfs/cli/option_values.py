"""How a person writes the value of an option, and the sentence that refuses a wrong one.

Knows: endpoints, prefixes, sizes, modes, durations and the like as text. Does not know: which
options there are, and where the text comes from.

Concurrency: none; pure functions.
"""

import ipaddress
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import SplitResult, unquote, urlsplit

from etcdfs.errors import EndpointError, PrefixError, TlsError, UsageError
from etcdfs.options import Endpoint, Kind, Option, rows

Texts = Mapping[str, str]
"""Options by their name, the long flag of the command line without its dashes."""

ON: Final = "on"
OFF: Final = "off"
"""The texts of an option that is only said or not."""

PREFIX_MAX: Final = 4096
"""Bytes of a prefix; it is repeated in every key of the mount, and PATH_MAX is as much."""

_RESERVED: Final = b"/.etcdfs/"
_ID_MAX: Final = 2**32 - 2  # -1 means "no id" to chown(2)
_MODE_MAX: Final = 0o777  # a value from the network is never setuid
_SIZE_MAX: Final = 2**63 - 1
_PORT_MAX: Final = 65535
_LOOPBACK: Final = "127.0.0.1"
_SECONDS_MAX: Final = 365 * 24 * 3600.0

_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9.])?")
_SIZE: Final = re.compile(r"([0-9]{1,19})(?:([kmgt])(ib?|b)?|b)?", re.IGNORECASE)
_MODE: Final = re.compile(r"(?:0o)?([0-7]{1,5})")
_DURATION: Final = re.compile(r"(?:[0-9.]+(?:us|ms|s|m|h))+")
_DURATION_PART: Final = re.compile(r"([0-9.]+)(us|ms|s|m|h)")
_NUMBER: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{0,12})?|\.[0-9]{1,12}")
_UNIT_S: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


# --- endpoints ------------------------------------------------------------------------------


def parse_endpoints(text: str, *, tls: str | None = None) -> tuple[Endpoint, ...]:
    """Read endpoints separated by commas, in order; one said twice counts once.

    Args:
        text: The endpoints.
        tls: What else asks for TLS, so that it is meant where no scheme is said; None: nothing.

    Raises:
        EndpointError: One of them cannot be understood.
        TlsError: One of them is `http://`, and something else asks for TLS.
    """
    parts = (part.strip() for part in text.split(","))
    return tuple(dict.fromkeys(parse_endpoint(part, tls=tls) for part in parts))


def parse_endpoint(text: str, *, tls: str | None = None) -> Endpoint:
    """Read `http://host:port`, `https://...`, `host:port` or `unix:///path`.

    An IPv6 address is in brackets.

    There is no default port, as with etcdctl: a forgotten one must not lead to another etcd.

    Args:
        text: The endpoint.
        tls: See `parse_endpoints`.

    Raises:
        EndpointError: It cannot be understood.
        TlsError: It is `http://`, and something else asks for TLS.
    """
    if not text:
        raise EndpointError("an endpoint is empty; expected http://HOST:PORT or HOST:PORT")
    if "@" in text:  # not repeated: what stands before it may be a password
        raise EndpointError("an endpoint has a user name in it ('@'); say --user instead")
    if not text.isprintable() or " " in text:
        raise EndpointError(f"the endpoint {text!r} has a blank or control character in it")
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http" if tls is None else "https", text
    if scheme.lower() == "unix":
        return _unix_socket(rest, text, tls)
    secure = _is_secure(scheme, text)
    if tls is not None and not secure:
        raise TlsError(f"the endpoint {text!r} is plain text, and {tls} asks for TLS; say https://")
    try:
        parts = urlsplit(f"//{rest}")
    except ValueError:  # only brackets are looked at so early
        raise EndpointError(f"the endpoint {text!r} has no valid IPv6 address") from None
    _check_address_only(parts, text)
    return Endpoint(_host(parts, text), _port(parts, text), secure)


def _unix_socket(quoted: str, text: str, tls: str | None) -> Endpoint:
    """Read what follows `unix://`, an absolute path in which `%` stands for odd characters."""
    path = unquote(quoted, errors="surrogateescape")
    if tls is not None:
        raise TlsError(f"the endpoint {text!r} is a Unix socket, and {tls} asks for TLS")
    if not path.strip("/") or not path.startswith("/") or "\0" in path:
        raise EndpointError(f"the endpoint {text!r} is no absolute path; expected unix:///PATH")
    if "," in path:  # gRPC would take it for two
        raise EndpointError(f"the endpoint {text!r} has a comma in its path")
    return Endpoint(path, 0)


def _is_secure(scheme: str, text: str) -> bool:
    match scheme.lower():
        case "http":
            return False
        case "https":
            return True
        case "unixs":
            raise EndpointError(
                f"the endpoint {text!r} is a Unix socket with TLS; without it, say unix:///PATH"
            )
        case _:
            raise EndpointError(
                f"the endpoint {text!r} has the unknown scheme {scheme!r}; expected http://HOST:PORT"
            )


def _check_address_only(parts: SplitResult, text: str) -> None:
    if not parts.netloc:
        raise EndpointError(
            f"the endpoint {text!r} is a path; expected http://HOST:PORT or HOST:PORT"
        )
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise EndpointError(
            f"the endpoint {text!r} goes on after the port; expected http://HOST:PORT"
        )


def _port(parts: SplitResult, text: str) -> int:
    try:
        port = parts.port
    except ValueError:
        raise EndpointError(
            f"the endpoint {text!r} has no valid port (a number from 1 to 65535)"
        ) from None
    if port is None:
        address = parts.netloc.rstrip(":")
        raise EndpointError(
            f"the endpoint {text!r} has no port (etcd's is mostly 2379, as in {address}:2379)"
        )
    if port == 0:
        raise EndpointError(f"the endpoint {text!r} has port 0, which nobody can listen on")
    return port


def _host(parts: SplitResult, text: str) -> str:
    """Return a checked host name or address."""
    host = parts.hostname or ""
    if "[" in parts.netloc:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise EndpointError(f"the endpoint {text!r} has no valid IPv6 address") from None
    elif parts.netloc.count(":") > 1:
        raise EndpointError(f"the endpoint {text!r} has an IPv6 address without its brackets")
    elif not _HOST.fullmatch(host):
        raise EndpointError(f"the endpoint {text!r} has no valid host name")
    return host


# --- the prefix -----------------------------------------------------------------------------


def parse_prefix(prefix: bytes) -> bytes:
    """Return the prefix so that it ends in one `/`; empty stays empty, the whole keyspace.

    Raises:
        PrefixError: It is not a place at which a tree can begin.
    """
    if not prefix:
        return prefix
    whole = prefix if prefix.endswith(b"/") else prefix + b"/"
    shown = repr(prefix)[1:]
    if b"\0" in whole:
        raise PrefixError(f"the prefix {shown} has a NUL byte in it")
    components = whole[:-1].split(b"/")
    # A leading slash makes the first component empty; that is how most keys look.
    if b"" in components[1:]:
        raise PrefixError(f"the prefix {shown} has an empty component (two slashes in a row)")
    if b"." in components or b".." in components:
        raise PrefixError(
            f"the prefix {shown} has a component '.' or '..', which etcd does not resolve"
        )
    if whole.startswith(_RESERVED):
        raise PrefixError(f"the prefix {shown} is inside /.etcdfs/, which belongs to etcdfs itself")
    if len(whole) > PREFIX_MAX:
        raise PrefixError(f"the prefix has {len(whole)} bytes; {PREFIX_MAX} are allowed")
    return whole


# --- scalars --------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Read bytes: `4096`, `64K`, `64M`, `1GiB` (powers of 1024), `1GB` (powers of 1000).

    These are the suffixes of dd(1).

    Raises:
        UsageError: It is not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a size; expected bytes, or a number with K, M, G or T")
    number, unit, ending = match.groups(default="")
    base = 1000 if ending.lower() == "b" else 1024
    size: int = int(number) * base ** ("kmgt".index(unit.lower()) + 1 if unit else 0)
    if size > _SIZE_MAX:
        raise UsageError(f"{text!r} is larger than any machine")
    return size


def parse_mode(text: str) -> int:
    """Read permission bits in octal: `644`, `0644`, `0o644`.

    Raises:
        UsageError: It is not an octal number, or has more than the nine permission bits.
    """
    match = _MODE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not an octal mode; expected one like 0644")
    mode = int(match[1], 8)
    if mode > _MODE_MAX:
        raise UsageError(f"{text!r} has more than the permission bits; 0777 is the most")
    return mode


def parse_seconds(text: str) -> float:
    """Read a duration: seconds (`5`, `0.5`), or as etcdctl has it (`500ms`, `5s`, `1m30s`).

    Raises:
        UsageError: It is not a duration.
    """
    parts = _DURATION_PART.findall(text) if _DURATION.fullmatch(text) else [(text, "s")]
    if not all(_NUMBER.fullmatch(number) for number, _ in parts):
        raise UsageError(
            f"{text!r} is not a duration; expected seconds, or one like 500ms or 1m30s"
        )
    seconds = math.fsum(float(number) * _UNIT_S[unit] for number, unit in parts)
    if seconds > _SECONDS_MAX:
        raise UsageError(f"{text!r} is more than a year")
    return seconds


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


def _parse_id(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > _ID_MAX:
        raise UsageError(f"{text!r} is not a numeric id")
    return int(text)


def parse_listen(text: str) -> tuple[str, int]:
    """Read where to listen: `PORT`, `HOST:PORT` or `[IPV6]:PORT`; port 0 is any that is free.

    Raises:
        UsageError: It is no such place.
    """
    host, _, port = text.rpartition(":")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > _PORT_MAX:
        raise UsageError(f"{text!r} has no port; expected PORT or HOST:PORT")
    bare = host.removeprefix("[").removesuffix("]")
    if ":" in bare and bare == host:
        raise UsageError(f"{text!r} has an IPv6 address without its brackets")
    return (bare or _LOOPBACK), int(port)


# --- by the table ---------------------------------------------------------------------------


def parse_fields(group: type[Any], texts: Texts) -> dict[str, Any]:
    """Return the fields of a dataclass that the texts set, but for its endpoints.

    Raises:
        CommandError: One of the texts cannot be understood.
    """
    return {
        row.field: parse_value(row, texts[row.name])
        for row in rows(group)
        if row.field is not None and row.name in texts and row.kind is not Kind.ENDPOINTS
    }


def parse_value(option: Option, text: str) -> object:
    """Return the value that a text stands for.

    Raises:
        UsageError: It cannot be understood; the message names the option.
        PrefixError: The same, of a prefix.
    """
    try:
        value = _PARSERS[option.kind](text)
    except UsageError as exc:
        raise UsageError(f"--{option.name}: {exc}") from None
    if option.choices and value not in option.choices:
        raise UsageError(f"--{option.name}: {text!r} is none of {', '.join(option.choices)}")
    if option.positive and not value:
        raise UsageError(f"--{option.name}: it must be more than 0")
    return value


_PARSERS: Final[Mapping[Kind, Callable[[str], object]]] = {
    Kind.FLAG: parse_flag,
    Kind.TEXT: lambda text: text or None,
    Kind.CHOICE: str.lower,
    Kind.PREFIX: lambda text: parse_prefix(text.encode(errors="surrogateescape")),
    Kind.FILE: lambda text: text or None,
    Kind.DIRECTORY: lambda text: text or None,
    Kind.SIZE: parse_size,
    Kind.SECONDS: parse_seconds,
    Kind.MODE: parse_mode,
    Kind.ID: _parse_id,
    Kind.LISTEN: parse_listen,
}
"""How the text of each kind is read; of endpoints, `parse_endpoints` with what asks for TLS."""
