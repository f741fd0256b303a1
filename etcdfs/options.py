"""What a mount can be told, as frozen values, and their JSON form.

What this room knows: the meaning, default and unit of every option. What it must not know: how
a person writes them (that is `option_text`), and where that text comes from.

The JSON form hands the options to the daemon's process; it is exact, and private to one
version of etcdfs.

Concurrency: none; pure functions and frozen values.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote

DEFAULT_CACHE_SIZE = 256 * 1024 * 1024
DEFAULT_TIMEOUT_S = 5.0
DEFAULT_KERNEL_TIMEOUT_S = 60.0
DEFAULT_SETTLE_TIMEOUT_S = 2.0
DEFAULT_WATCH_TIMEOUT_S = 10.0
DEFAULT_AUDIT_INTERVAL_S = 300.0
DEFAULT_WRITE_BUFFER = 256 * 1024 * 1024
DEFAULT_MAX_FILE_SIZE = 1536 * 1024  # etcd's --max-request-bytes


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

    Attributes:
        cacert: File of the authorities that members' certificates come from; None: the system's.
        cert: File of our own certificate.
        key: File of its private key.
        skip_verify: Take whatever certificate a member shows.
        server_name: The name that members' certificates must have; None: the endpoint's.
        user: etcd's user; None: nobody.
        password: The user's password, unless it is in a file.
        password_file: The file it is in.
    """

    cacert: str | None = None
    cert: str | None = None
    key: str | None = None
    skip_verify: bool = False
    server_name: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: str | None = None


OPEN = Security()
"""Nobody in particular, and members are believed as far as the system does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MountOptions:
    """Everything `etcdfs mount` can be told.

    Attributes:
        mountpoint: Absolute path of the directory to mount over.
        endpoints: The etcd members, in order of preference; empty only with `embedded`.
        security: Certificates, and the user.
        prefix: The key prefix shown as the root: ends in one `/`, or is empty (raw keyspace).
        cache: Mirror the keyspace and watch it; otherwise ask etcd at every operation.
        read_only: Refuse every change with EROFS.
        cache_size: Bytes of values kept in memory.
        uid: Owner of every file.
        gid: Group of every file.
        file_mode: Permission bits of files, before `umask`.
        dir_mode: Permission bits of directories, before `umask`.
        umask: Bits taken away from both modes.
        allow_other: Let other users in (permissions are then checked by the kernel).
        no_attrs: Put nothing but the user's own keys into etcd: no attributes.
        timeout_s: Bound of every request to etcd.
        kernel_timeout_s: How long the kernel may keep an entry or attributes unasked.
        settle_timeout_s: How long a write waits for the watch to bring it home.
        watch_timeout_s: Silence of the watch after which etcd is asked whether it is there.
        audit_interval_s: Time between two comparisons of the mirror with etcd; 0: none.
        max_stale_s: How long the mirror is shown while etcd is not heard; 0: without limit.
        linearizable: Whether a reader waits until the mirror shows what etcd holds now.
        wait_for_etcd_s: How long the mount is tried again while etcd does not answer.
        max_file_size: Largest value in bytes; more is EFBIG.
        write_buffer: Bytes of files that are written to and not published yet.
        embedded: Start a private etcd.
        data_dir: Where the private etcd keeps its data; None: the XDG default.
        fuse_options: Further options for the kernel mount.
    """

    mountpoint: str
    endpoints: tuple[Endpoint, ...] = ()
    security: Security = OPEN
    prefix: bytes = b"/"
    cache: bool = False
    read_only: bool = False
    cache_size: int = DEFAULT_CACHE_SIZE
    uid: int = 0
    gid: int = 0
    file_mode: int = 0o644
    dir_mode: int = 0o755
    umask: int = 0
    allow_other: bool = False
    no_attrs: bool = False
    timeout_s: float = DEFAULT_TIMEOUT_S
    kernel_timeout_s: float = DEFAULT_KERNEL_TIMEOUT_S
    settle_timeout_s: float = DEFAULT_SETTLE_TIMEOUT_S
    watch_timeout_s: float = DEFAULT_WATCH_TIMEOUT_S
    audit_interval_s: float = DEFAULT_AUDIT_INTERVAL_S
    max_stale_s: float = 0.0
    linearizable: bool = False
    wait_for_etcd_s: float = 0.0
    max_file_size: int = DEFAULT_MAX_FILE_SIZE
    write_buffer: int = DEFAULT_WRITE_BUFFER
    embedded: bool = False
    data_dir: str | None = None
    fuse_options: tuple[str, ...] = ()


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
    fields = dict(encoded)
    fields["prefix"] = fields["prefix"].encode("latin-1")
    fields["endpoints"] = tuple(Endpoint(**endpoint) for endpoint in fields["endpoints"])
    fields["security"] = Security(**fields["security"])
    fields["fuse_options"] = tuple(fields["fuse_options"])
    return MountOptions(**fields)
