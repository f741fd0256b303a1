"""How a person writes options: every text form, and the sentence that refuses a wrong one.

What this room knows: endpoints, prefixes, sizes, modes and durations as text, and the option
lists of mount(8). What it must not know: where the text comes from (command line, environment,
fstab), and what the options are used for.

Every option has a name, the long flag of the command line without its dashes; a `Texts` maps
names to texts. `on` and `off` are the texts of an option that is only said or not.

Concurrency: none; pure functions and frozen values.
"""

import ipaddress
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

from etcdfs.cli.tls_options import OFF, ON, SECURITY, Texts, asks_for_tls, parse_flag, read_security
from etcdfs.errors import EndpointError, PrefixError, TlsError, UsageError
from etcdfs.options import OPEN, Endpoint, MountOptions

PREFIX_MAX: Final = 4096
"""Bytes of a prefix; it is repeated in every key of the mount, and PATH_MAX is as much."""

_RESERVED: Final = b"/.etcdfs/"
_ID_MAX: Final = 2**32 - 2  # -1 means "no id" to chown(2)
_MODE_MAX: Final = 0o777  # a value from the network is never setuid
_SIZE_MAX: Final = 2**63 - 1
_SECONDS_MAX: Final = 365 * 24 * 3600.0

_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9.])?")
_SIZE: Final = re.compile(r"([0-9]{1,19})(?:([kmgt])(ib?|b)?|b)?", re.IGNORECASE)
_MODE: Final = re.compile(r"(?:0o)?([0-7]{1,5})")
_DURATION: Final = re.compile(r"(?:[0-9.]+(?:us|ms|s|m|h))+")
_DURATION_PART: Final = re.compile(r"([0-9.]+)(us|ms|s|m|h)")
_NUMBER: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{0,12})?|\.[0-9]{1,12}")
_UNIT_S: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}

_Value = TypeVar("_Value")


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


def parse_consistency(text: str) -> bool:
    """Read `watch` or `linearizable`; return whether it is the latter.

    Raises:
        UsageError: It is neither.
    """
    match text.lower():
        case "linearizable":
            return True
        case "watch":
            return False
        case _:
            raise UsageError(f"{text!r} is neither watch nor linearizable")


def _parse_id(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > _ID_MAX:
        raise UsageError(f"{text!r} is not a numeric id")
    return int(text)


def _positive(parse: Callable[[str], _Value]) -> Callable[[str], _Value]:
    def checked(text: str) -> _Value:
        value = parse(text)
        if not value:
            raise UsageError("it must be more than 0")
        return value

    return checked


# --- option lists, as in -o and fstab -------------------------------------------------------

_FLAGS: Final = {
    "ro": ("read-only", ON),
    "rw": ("read-only", OFF),
    "read-only": ("read-only", ON),
    "allow-other": ("allow-other", ON),
    "no-attrs": ("no-attrs", ON),
    "cache": ("cache", ON),
    "no-cache": ("cache", OFF),
    "nocache": ("cache", OFF),
    "embedded": ("embedded", ON),
    "insecure-skip-tls-verify": ("insecure-skip-tls-verify", ON),
}

_ALIASES: Final = {"username": "user"}
"""mount(8) takes `user=` in fstab for itself: it lets every user mount, and passes on less."""

_KERNEL: Final = frozenset(
    {"nosuid", "nodev", "exec", "noexec", "atime", "noatime", "sync", "async", "dirsync"}
    | {"default_permissions", "nosymfollow"}
)
_KERNEL_VALUED: Final = frozenset(
    {"fsname", "max_read", "context", "fscontext", "defcontext", "rootcontext"}
)

_IGNORED: Final = frozenset(
    # For mount(8), systemd and the boot; they mean nothing once mounting has begun.
    {"defaults", "auto", "noauto", "fail", "nofail", "_netdev", "comment", "helper", "uhelper"}
    | {"user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup"}
    # How it is anyhow: links are followed, nothing is printed, there are no mandatory locks.
    | {"symfollow", "silent", "loud", "mand", "nomand", "iversion", "noiversion"}
    # Access times are not kept, however often they would be.
    | {"relatime", "norelatime", "strictatime", "nostrictatime", "lazytime", "nolazytime"}
    | {"diratime", "nodiratime"}
)

_REFUSED: Final = {
    "suid": "values from the network are never setuid",
    "dev": "etcd holds no device nodes",
    "allow_root": "use allow_other",
    "auto_unmount": (
        "after a crash an empty directory would look like deleted data; the next mount clears it"
    ),
    "remount": "unmount and mount again",
    "bind": "it is for mount(8) itself",
    "password": "others could see it; use password_file",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionList:
    """What an option list came to.

    Attributes:
        texts: The options that have a flag of their own, by its name.
        fuse_options: What the kernel mount is given.
    """

    texts: Texts
    fuse_options: tuple[str, ...]


def parse_option_list(text: str) -> OptionList:
    """Read options as mount(8) and fstab write them: `ro,prefix=/app,cache-size=64M`.

    Every option of the command line may be given without its dashes, `_` for `-` too.
    A value cannot have a comma in it: repeat `endpoints=` for several endpoints.

    Raises:
        UsageError: One of them is unknown or refused.
    """
    texts: dict[str, str] = {}
    fuse_options: list[str] = []
    for option in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = option.partition("=")
        dashed = _ALIASES.get(name, name.replace("_", "-"))
        valued = bool(equals) and dashed in VALUED
        if name in _REFUSED:
            raise UsageError(f"-o {name} is refused: {_REFUSED[name]}")
        if name in _KERNEL_VALUED if equals else name in _KERNEL:
            fuse_options.append(option)
        elif (name in _IGNORED and not valued) or name.startswith(("x-", "X-")):
            continue
        elif dashed == "user" and ":" in value:  # not repeated
            raise UsageError(
                "-o user=NAME:PASSWORD is refused: others could see it; use password_file"
            )
        elif dashed in _FLAGS and not equals:
            texts.update([_FLAGS[dashed]])
        elif valued:
            both = dashed == "endpoints" and dashed in texts
            texts[dashed] = f"{texts[dashed]},{value}" if both else value
        else:
            # Its value is not repeated: it may be a password, misspelt.
            raise UsageError(f"-o {name} is refused: {_why_unknown(dashed, bool(equals))}")
    return OptionList(texts=texts, fuse_options=tuple(dict.fromkeys(fuse_options)))


def _why_unknown(name: str, has_value: bool) -> str:
    if name in VALUED:
        return f"it needs a value ({name}=...)"
    if name in _FLAGS and has_value:
        return "it takes no value"
    return "there is no such option"


# --- all together ---------------------------------------------------------------------------

_PARSERS: Final[Mapping[str, tuple[str, Callable[[str], object]]]] = {
    "prefix": ("prefix", lambda text: parse_prefix(text.encode(errors="surrogateescape"))),
    "cache": ("cache", parse_flag),
    "read-only": ("read_only", parse_flag),
    "cache-size": ("cache_size", parse_size),
    "uid": ("uid", _parse_id),
    "gid": ("gid", _parse_id),
    "file-mode": ("file_mode", parse_mode),
    "dir-mode": ("dir_mode", parse_mode),
    "umask": ("umask", parse_mode),
    "allow-other": ("allow_other", parse_flag),
    "no-attrs": ("no_attrs", parse_flag),
    "timeout": ("timeout_s", _positive(parse_seconds)),
    "kernel-timeout": ("kernel_timeout_s", parse_seconds),
    "settle-timeout": ("settle_timeout_s", parse_seconds),
    "watch-timeout": ("watch_timeout_s", _positive(parse_seconds)),
    "audit-interval": ("audit_interval_s", parse_seconds),
    "max-stale": ("max_stale_s", parse_seconds),
    "consistency": ("linearizable", parse_consistency),
    "wait-for-etcd": ("wait_for_etcd_s", parse_seconds),
    "max-file-size": ("max_file_size", _positive(parse_size)),
    "write-buffer": ("write_buffer", _positive(parse_size)),
    "embedded": ("embedded", parse_flag),
    "data-dir": ("data_dir", str),
}
"""By the option's name: the field of `MountOptions`, and how its text is read."""

NAMES: Final = frozenset(_PARSERS) | (SECURITY - {"password"}) | {"endpoints"}
"""Every option that a mount can be told by text."""

LOGGING: Final = frozenset({"log-level", "log-file"})
"""Options of the daemon's log; not part of `MountOptions`."""

VALUED: Final = (NAMES | LOGGING) - {name for name, _ in _FLAGS.values()}
"""Every option that takes a value."""


def read_options(mountpoint: str, texts: Texts, fuse_options: tuple[str, ...] = ()) -> MountOptions:
    """Put a mount's options together; what `texts` does not say keeps its default.

    The options of the log are passed over.

    Raises:
        CommandError: One of the texts cannot be understood, or two contradict one another.
    """
    fields: dict[str, Any] = {}
    for name in _PARSERS.keys() & texts.keys():
        text = texts[name]
        field, parse = _PARSERS[name]
        try:
            fields[field] = parse(text)
        except PrefixError:  # its message names what it is about
            raise
        except UsageError as exc:
            raise UsageError(f"--{name}: {exc}") from None
    if "endpoints" in texts:
        fields["endpoints"] = parse_endpoints(texts["endpoints"], tls=asks_for_tls(texts))
    fields["security"] = read_security(texts)
    options = MountOptions(mountpoint=mountpoint, fuse_options=fuse_options, **fields)
    if options.embedded and options.endpoints:
        raise UsageError("--embedded starts an etcd of its own; --endpoints cannot go with it")
    if not options.embedded and not options.endpoints:
        raise UsageError("no endpoints: say --endpoints HOST:PORT, or --embedded")
    if options.embedded and options.security != OPEN:
        raise UsageError("--embedded starts an etcd of its own, without certificates or users")
    if options.data_dir is not None and not options.embedded:
        raise UsageError("--data-dir is where --embedded keeps its data; it needs --embedded")
    return options
