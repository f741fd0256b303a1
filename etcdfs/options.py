"""What a mount can be told: the table of options, and the frozen values that come of it.

Knows: each option's name, default, unit and meaning. Does not know: how text becomes a value (that
is `option_parsing`), and where that text comes from.

**A new option is one row here**, a field with its `option(...)`, and whoever reads the field. The
flag, its place in `--help`, the name for `-o`, the environment variable and the reference
(docs/reference.md) follow from the row.

The JSON form hands the options to the daemon's process; it is exact, and private to one
version of etcdfs.

Concurrency: none; pure functions and frozen values.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any, Final, TypeVar
from urllib.parse import quote

_T = TypeVar("_T")


# --- what a row says ------------------------------------------------------------------------


class Kind(Enum):
    """How an option is written; the value stands for it in `--help`."""

    FLAG = ""
    TEXT = "TEXT"
    CHOICE = "one of its choices"
    ENDPOINTS = "URL,..."
    PREFIX = "P"
    FILE = "FILE"
    DIRECTORY = "DIR"
    SIZE = "BYTES"
    SECONDS = "S"
    MODE = "OCTAL"
    ID = "N"
    LISTEN = "[HOST:]PORT"


class Panel(Enum):
    """What an option is about; `--help` and the reference have a table for each, in this order."""

    MOUNT = "Mount"
    ETCD = "etcd"
    CACHE = "Cache"
    PERMISSIONS = "Permissions"
    LOGGING = "Logging"
    ADVANCED = "Advanced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One row of the table.

    Attributes:
        name: The long flag without its dashes.
        field: The field that it sets; None: it is read together with others.
        kind: How its value is written.
        panel: What it is about.
        help: Its line in `--help`.
        more: What the reference adds.
        default: The value of the field when nothing is said.
        shown: The default for a person, where the value does not say it.
        metavar: What stands for the value of a TEXT.
        choices: The texts of a CHOICE.
        short: A short flag.
        negatable: Whether there is `--no-NAME`.
        positive: Whether 0 is refused.
        etcdctl: Its variable in etcdctl's environment, after `ETCDCTL_`; empty: it has none.
        is_secret: Whether it is said in the environment only: anybody can read a command line.
    """

    name: str
    field: str | None = None
    kind: Kind
    panel: Panel
    help: str
    more: str = ""
    default: object = None
    shown: str = ""
    metavar: str = ""
    choices: tuple[str, ...] = ()
    short: str = ""
    negatable: bool = False
    positive: bool = False
    etcdctl: str = ""
    is_secret: bool = False

    @property
    def variables(self) -> list[str]:
        """Return its names in the environment; the first that is set counts."""
        ours = f"ETCDFS_{self.name.upper().replace('-', '_')}"
        return [ours, f"ETCDCTL_{self.etcdctl}"] if self.etcdctl else [ours]

    @property
    def default_text(self) -> str:
        """Return the default as a person would write it; empty if there is nothing to say."""
        match self.default:
            case _ if self.shown:
                return self.shown
            case bool():
                return f"no-{self.name}" if self.negatable and not self.default else ""
            case int(size) if self.kind is Kind.SIZE:
                power = max(power for power in range(4) if not size % 1024**power)
                return f"{size // 1024**power}{'BKMG'[power]}".removesuffix("B")
            case int(mode) if self.kind is Kind.MODE:
                return f"0{mode:o}" if mode else "0"
            case int() | float():
                return f"{self.default:g}"
            case str(text):
                return text
            case _:
                return ""


def option(default: _T, kind: Kind, panel: Panel, help: str, **more: object) -> _T:  # noqa: A002
    """Return a field of a dataclass that is a row of the table; see `Option` for the rest.

    The option has the name of its field, without a unit, unless `name` says another.
    """
    row = {"default": default, "kind": kind, "panel": panel, "help": help, **more}
    return field(default=default, repr=not more.get("is_secret"), metadata=row)


def rows(group: type[Any]) -> list[Option]:
    """Return the options that set a field of a dataclass, in its order."""
    return [
        Option(
            **{"name": each.name.removesuffix("_s").replace("_", "-"), **each.metadata},
            field=each.name,
        )
        for each in fields(group)
        if each.metadata
    ]


# --- the table ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One etcd client address.

    Attributes:
        host: A name or an address, or the absolute path of a Unix socket.
        port: Its port; 0 for a Unix socket.
        secure: Whether it is reached by TLS.
    """

    host: str
    port: int
    secure: bool = False

    def __str__(self) -> str:
        if self.host.startswith("/"):  # as gRPC and etcdctl have it
            return f"unix://{quote(self.host, safe='/:', errors='surrogateescape')}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """How etcd is to know us, and we it.

    Files are named, not read here: they may change while a mount lives.
    """

    cacert: str | None = option(
        None,
        Kind.FILE,
        Panel.ETCD,
        "Trust members whose certificate comes from these authorities (PEM).",
        shown="the system's",
        etcdctl="CACERT",
    )
    cert: str | None = option(
        None,
        Kind.FILE,
        Panel.ETCD,
        "Certificate by which etcd knows this mount (PEM); needs --key.",
        etcdctl="CERT",
    )
    key: str | None = option(
        None,
        Kind.FILE,
        Panel.ETCD,
        "Private key of --cert (PEM, not encrypted).",
        etcdctl="KEY",
    )
    skip_verify: bool = option(
        False,
        Kind.FLAG,
        Panel.ETCD,
        "Take any certificate that has not expired. For tests only.",
        etcdctl="INSECURE_SKIP_TLS_VERIFY",
        name="insecure-skip-tls-verify",
    )
    server_name: str | None = option(
        None,
        Kind.TEXT,
        Panel.ETCD,
        "Name that the members' certificates must have.",
        metavar="NAME",
        shown="the endpoint's host",
    )
    user: str | None = option(
        None,
        Kind.TEXT,
        Panel.ETCD,
        "etcd's user; asks for the password on a terminal, if it is said nowhere.",
        metavar="NAME[:PASSWORD]",
        etcdctl="USER",
        more="`-o user=NAME:PASSWORD` is refused: others could see it.",
    )
    password: str | None = option(
        None,
        Kind.TEXT,
        Panel.ETCD,
        "The user's password. Only in the environment, where other users cannot see it.",
        etcdctl="PASSWORD",
        is_secret=True,
    )
    password_file: str | None = option(
        None,
        Kind.FILE,
        Panel.ETCD,
        "File with the password; read again at each login, so that it may be changed.",
        more="All of the file but a newline at its end.",
    )


OPEN: Final = Security()
"""Nobody in particular, and members are believed as far as the system does."""

INSECURE_TRANSPORT: Final = Option(
    name="insecure-transport",
    kind=Kind.FLAG,
    panel=Panel.ETCD,
    help="Whether endpoints without a scheme are plain text; not with any other TLS option.",
    default=True,
    negatable=True,
    etcdctl="INSECURE_TRANSPORT",
)
"""It decides what the text of the endpoints means; nothing is left of it in the values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """How the daemon logs. The path is absolute."""

    level: str = option(
        "info",
        Kind.CHOICE,
        Panel.LOGGING,
        "What is worth a line.",
        choices=("debug", "info", "warning", "error"),
        name="log-level",
    )
    file: str | None = option(
        None,
        Kind.FILE,
        Panel.LOGGING,
        "Append the log to this file.",
        shown="syslog; stderr with --foreground",
        more="It is opened anew when it is rotated away. In the background without it: syslog if "
        "there is one, else nowhere.",
        name="log-file",
    )
    format: str = option(
        "text",
        Kind.CHOICE,
        Panel.LOGGING,
        "Lines for a person, or fields for a program.",
        choices=("text", "journal", "json"),
        more="`json` has an object in each line, `journal` goes to systemd's journal with the same "
        "fields, and not to a file.",
        name="log-format",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MountOptions:
    """Everything `etcdfs mount` can be told about the mount. Bytes, seconds, absolute paths.

    Attributes:
        mountpoint: The directory to mount over.
        fast_path: Whether the kernel is told what pyfuse3 cannot tell it: if that can be had,
            or else no mount; or not at all.
        fuse_options: Further options for the kernel mount.
        endpoints: The etcd members, in order of preference; empty only with `embedded`.
        prefix: The key prefix shown as the root: ends in one `/`, or is empty (raw keyspace).
    """

    mountpoint: str
    fuse_options: tuple[str, ...] = ()
    prefix: bytes = option(
        b"/",
        Kind.PREFIX,
        Panel.MOUNT,
        'Show the keys below this prefix; "" shows the whole keyspace raw.',
        shown="/",
        more="It is taken to end in one `/`.",
    )
    read_only: bool = option(False, Kind.FLAG, Panel.MOUNT, "Refuse every change.", short="-r")
    endpoints: tuple[Endpoint, ...] = option(
        (),
        Kind.ENDPOINTS,
        Panel.ETCD,
        "etcd's client addresses: HOST:PORT, http://..., https://... or unix:///PATH.",
        shown="127.0.0.1:2379",  # etcdctl's own default
        etcdctl="ENDPOINTS",
        more="Best all of them; there is no default port. Members are not discovered by DNS: with "
        "`ETCDCTL_DISCOVERY_SRV` set, etcdfs refuses to mount.",
    )
    security: Security = OPEN
    timeout_s: float = option(
        5.0,
        Kind.SECONDS,
        Panel.ETCD,
        "Bound of every request to etcd, in seconds.",
        positive=True,
        etcdctl="COMMAND_TIMEOUT",
    )
    wait_for_etcd_s: float = option(
        0.0,
        Kind.SECONDS,
        Panel.ETCD,
        "Try again for so long while etcd does not answer, before the mount fails.",
    )
    embedded: bool = option(
        False,
        Kind.FLAG,
        Panel.ETCD,
        "Start a private etcd, for you alone, stop it after unmount, and print its URL.",
        more="The variables of etcdctl, and those of this table that say who etcd is, are not looked "
        "at then.",
    )
    data_dir: str | None = option(
        None,
        Kind.DIRECTORY,
        Panel.ETCD,
        "Where --embedded keeps its data between runs.",
        shown="$XDG_DATA_HOME/etcdfs/embedded",
    )
    cache: bool = option(
        False,
        Kind.FLAG,
        Panel.CACHE,
        "Keep a copy of all keys in memory, coherent by a watch; or ask etcd every time.",
        negatable=True,
    )
    cache_size: int = option(
        256 * 1024**2,
        Kind.SIZE,
        Panel.CACHE,
        "Keep up to so much of the values in memory (64M, 1GiB).",
    )
    consistency: str = option(
        "watch",
        Kind.CHOICE,
        Panel.CACHE,
        "Show what the watch has brought; or ask etcd at each open that this is all.",
        choices=("watch", "linearizable"),
    )
    max_stale_s: float = option(
        0.0,
        Kind.SECONDS,
        Panel.CACHE,
        "Show nothing any more when etcd has not been heard for so long (EIO).",
        shown="0: no limit",
    )
    audit_interval_s: float = option(
        300.0,
        Kind.SECONDS,
        Panel.CACHE,
        "Compare the copy with etcd so often, and mend it; 0: never.",
        more="Plus up to half.",
    )
    inotify: str = option(
        "auto",
        Kind.CHOICE,
        Panel.CACHE,
        "Raise inotify events for other clients' changes: where somebody watches, always, never.",
        choices=("auto", "on", "off"),
        more="`on` is for watchers that this process cannot see, outside its container, say.",
    )
    state_dir: str | None = option(
        None,
        Kind.DIRECTORY,
        Panel.CACHE,
        "Keep a snapshot of the copy in this directory, to start from.",
        more="Yours, one for each mount; made with mode 0700 if it is not there. Needs `--cache`.",
    )
    offline_start: bool = option(
        False,
        Kind.FLAG,
        Panel.CACHE,
        "Mount the snapshot if etcd does not answer, and go live when it does.",
        more="Needs `--state-dir`.",
    )
    uid: int = option(
        0,
        Kind.ID,
        Panel.PERMISSIONS,
        "Owner of every file.",
        shown="yours",
        more="What has its own keeps it.",
    )
    gid: int = option(
        0,
        Kind.ID,
        Panel.PERMISSIONS,
        "Group of every file.",
        shown="yours",
        more="What has its own keeps it.",
    )
    file_mode: int = option(
        0o644,
        Kind.MODE,
        Panel.PERMISSIONS,
        "Permissions of files.",
        more="What has its own keeps it.",
    )
    dir_mode: int = option(
        0o755,
        Kind.MODE,
        Panel.PERMISSIONS,
        "Permissions of directories.",
        more="What has its own keeps it.",
    )
    umask: int = option(0, Kind.MODE, Panel.PERMISSIONS, "Permissions taken away from both.")
    allow_other: bool = option(
        False,
        Kind.FLAG,
        Panel.PERMISSIONS,
        "Let other users in; needs user_allow_other in /etc/fuse.conf unless root.",
    )
    no_attrs: bool = option(
        False,
        Kind.FLAG,
        Panel.PERMISSIONS,
        "Keep no attributes of files in etcd: no chmod, chown or symbolic links.",
    )
    metrics_listen: tuple[str, int] | None = option(
        None,
        Kind.LISTEN,
        Panel.ADVANCED,
        "Serve /metrics for Prometheus, and /healthz, by HTTP.",
        more="On 127.0.0.1 if no host is said; whoever can connect there can read them.",
    )
    no_control_dir: bool = option(
        False,
        Kind.FLAG,
        Panel.ADVANCED,
        "Have no directory .etcdfs (status, metrics, revision, config) at the root.",
    )
    max_file_size: int = option(
        1536 * 1024,
        Kind.SIZE,
        Panel.ADVANCED,
        "Largest file; as etcd's --max-request-bytes.",
        positive=True,
        more="Larger ones are refused (EFBIG).",
    )
    write_buffer: int = option(
        256 * 1024**2,
        Kind.SIZE,
        Panel.ADVANCED,
        "Hold at most so much that is written and not written back; a user a quarter of it.",
        positive=True,
        more="Whole files, from the first write to the close, or to the last close of one that "
        "was unlinked. More is EDQUOT for one user, ENOSPC for all together; at least one file of "
        "`--max-file-size` fits.",
    )
    kernel_timeout_s: float = option(
        60.0,
        Kind.SECONDS,
        Panel.ADVANCED,
        "How long the kernel may go without asking again, should a notice be lost.",
    )
    settle_timeout_s: float = option(
        2.0,
        Kind.SECONDS,
        Panel.ADVANCED,
        "How long a write waits for the watch to bring it back.",
    )
    watch_timeout_s: float = option(
        10.0,
        Kind.SECONDS,
        Panel.ADVANCED,
        "Ask etcd whether it is there when the watch has been silent for so long.",
        positive=True,
    )
    fast_path: str = option(
        "auto",
        Kind.CHOICE,
        Panel.ADVANCED,
        "Let the kernel keep more than pyfuse3 can tell it: if possible, or else no mount (on).",
        more="Listings and links, and less is asked when files are closed, written, and given "
        "attributes. It needs a library that is compiled at the installation (B97).",
        choices=("auto", "on", "off"),
    )

    @property
    def linearizable(self) -> bool:
        """Return whether a reader waits until the mirror shows what etcd holds now."""
        return self.consistency == "linearizable"

    @property
    def kernel_lifetime_s(self) -> float:
        """Return how long the kernel may keep an answer; 0 if each one must be asked for."""
        return self.kernel_timeout_s if self.cache and not self.linearizable else 0.0


_PANELS: Final = list(Panel)
SECURITY: Final = (*rows(Security), INSECURE_TRANSPORT)
OPTIONS: Final = {
    row.name: row
    for row in sorted(
        [*rows(MountOptions), *SECURITY, *rows(LogSettings)],
        key=lambda row: _PANELS.index(row.panel),
    )
}
"""The whole table, by name."""


# --- JSON -----------------------------------------------------------------------------------


def encode_options(options: MountOptions) -> dict[str, Any]:
    """Return the options as JSON can hold them."""
    encoded = asdict(options)
    encoded["prefix"] = options.prefix.decode("latin-1")  # one character for every byte
    return encoded


def decode_options(encoded: Mapping[str, Any]) -> MountOptions:
    """Return the options that `encode_options` was given.

    Raises:
        TypeError: The value comes from another version of etcdfs.
        KeyError: The same.
    """
    values = dict(encoded)
    values["prefix"] = values["prefix"].encode("latin-1")
    values["endpoints"] = tuple(Endpoint(**endpoint) for endpoint in values["endpoints"])
    values["security"] = Security(**values["security"])
    values["fuse_options"] = tuple(values["fuse_options"])
    listen = values["metrics_listen"]
    values["metrics_listen"] = None if listen is None else tuple(listen)
    return MountOptions(**values)
