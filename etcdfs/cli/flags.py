"""The flags of `etcdfs mount`, in the order and the panels of --help.

What this room knows: how each option is spelt, where else it may be said, and its line of help.
What it must not know: what its text means (`option_text`), and what is done with it (`cli`).

Concurrency: none; declarations only.
"""

from pathlib import Path
from typing import Annotated, Final

import typer

from etcdfs.process.logs import LEVELS

DEFAULT_ENDPOINTS: Final = "127.0.0.1:2379"  # etcdctl's own default

_MOUNT = "Mount"
_ETCD = "etcd"
_CACHE = "Cache"
_PERMISSIONS = "Permissions"
_LOGGING = "Logging"
_ADVANCED = "Advanced"

Mountpoint = Annotated[
    Path,
    typer.Argument(metavar="MOUNTPOINT", help="The empty directory to mount over."),
]
MountedAt = Annotated[Path, typer.Argument(metavar="MOUNTPOINT", help="Where etcdfs is mounted.")]
Prefix = Annotated[
    str,
    typer.Option(
        metavar="P",
        envvar="ETCDFS_PREFIX",
        rich_help_panel=_MOUNT,
        show_default="/",
        help='Show the keys below this prefix; "" shows the whole keyspace raw.',
    ),
]
ReadOnly = Annotated[
    bool,
    typer.Option(
        "--read-only",
        "-r",
        envvar="ETCDFS_READ_ONLY",
        rich_help_panel=_MOUNT,
        help="Refuse every change.",
    ),
]
Foreground = Annotated[
    bool,
    typer.Option(
        "--foreground",
        "-f",
        rich_help_panel=_MOUNT,
        help="Stay, for systemd and containers; log to stderr.",
    ),
]
OptionLists = Annotated[
    list[str],
    typer.Option(
        "-o",
        metavar="OPT,...",
        rich_help_panel=_MOUNT,
        show_default=False,
        help="Options as in fstab: ro, allow_other, noexec, or any flag without its dashes.",
    ),
]
Endpoints = Annotated[
    list[str],
    typer.Option(
        metavar="URL,...",
        envvar=["ETCDFS_ENDPOINTS", "ETCDCTL_ENDPOINTS"],
        rich_help_panel=_ETCD,
        show_default=DEFAULT_ENDPOINTS,
        help="etcd's client addresses, [http[s]://]HOST:PORT or unix:///PATH.",
    ),
]
Timeout = Annotated[
    str,
    typer.Option(
        metavar="S",
        envvar=["ETCDFS_TIMEOUT", "ETCDCTL_COMMAND_TIMEOUT"],
        rich_help_panel=_ETCD,
        show_default="5",
        help="Bound of every request to etcd, in seconds.",
    ),
]
CaCert = Annotated[
    str,
    typer.Option(
        "--cacert",
        metavar="FILE",
        envvar=["ETCDFS_CACERT", "ETCDCTL_CACERT"],
        rich_help_panel=_ETCD,
        show_default="the system's",
        help="Trust members whose certificate comes from these authorities (PEM).",
    ),
]
Cert = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        envvar=["ETCDFS_CERT", "ETCDCTL_CERT"],
        rich_help_panel=_ETCD,
        help="Certificate by which etcd knows this mount (PEM); needs --key.",
    ),
]
Key = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        envvar=["ETCDFS_KEY", "ETCDCTL_KEY"],
        rich_help_panel=_ETCD,
        help="Private key of --cert (PEM, not encrypted).",
    ),
]
InsecureSkipTlsVerify = Annotated[
    bool,
    typer.Option(
        "--insecure-skip-tls-verify",
        envvar=["ETCDFS_INSECURE_SKIP_TLS_VERIFY", "ETCDCTL_INSECURE_SKIP_TLS_VERIFY"],
        rich_help_panel=_ETCD,
        help="Take any certificate that has not expired. For tests only.",
    ),
]
InsecureTransport = Annotated[
    bool,
    typer.Option(
        "--insecure-transport/--no-insecure-transport",
        envvar=["ETCDFS_INSECURE_TRANSPORT", "ETCDCTL_INSECURE_TRANSPORT"],
        rich_help_panel=_ETCD,
        show_default=False,
        help="Whether endpoints without a scheme are plain text; not with any other TLS option.",
    ),
]
ServerName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        envvar="ETCDFS_SERVER_NAME",
        rich_help_panel=_ETCD,
        show_default="the endpoint's host",
        help="Name that the members' certificates must have.",
    ),
]
User = Annotated[
    str,
    typer.Option(
        metavar="NAME[:PASSWORD]",
        envvar=["ETCDFS_USER", "ETCDCTL_USER"],
        rich_help_panel=_ETCD,
        help="etcd's user; asks for the password on a terminal, if it is said nowhere.",
    ),
]
PasswordFile = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        envvar="ETCDFS_PASSWORD_FILE",
        rich_help_panel=_ETCD,
        help="File with the password; read again at each login, so that it may be changed.",
    ),
]
WaitForEtcd = Annotated[
    str,
    typer.Option(
        metavar="S",
        envvar="ETCDFS_WAIT_FOR_ETCD",
        rich_help_panel=_ETCD,
        show_default="0",
        help="Try again for so long while etcd does not answer, before the mount fails.",
    ),
]
Embedded = Annotated[
    bool,
    typer.Option(
        "--embedded",
        envvar="ETCDFS_EMBEDDED",
        rich_help_panel=_ETCD,
        help="Start a private etcd, for you alone, stop it after unmount, and print its URL.",
    ),
]
DataDir = Annotated[
    str,
    typer.Option(
        metavar="DIR",
        envvar="ETCDFS_DATA_DIR",
        rich_help_panel=_ETCD,
        show_default="$XDG_DATA_HOME/etcdfs/embedded",
        help="Where --embedded keeps its data between runs.",
    ),
]
Cache = Annotated[
    bool,
    typer.Option(
        "--cache/--no-cache",
        envvar="ETCDFS_CACHE",
        rich_help_panel=_CACHE,
        help="Keep a copy of all keys in memory, coherent by a watch; or ask etcd every time.",
    ),
]
CacheSize = Annotated[
    str,
    typer.Option(
        metavar="BYTES",
        envvar="ETCDFS_CACHE_SIZE",
        rich_help_panel=_CACHE,
        show_default="256M",
        help="Keep up to so much of the values in memory (64M, 1GiB).",
    ),
]
Consistency = Annotated[
    str,
    typer.Option(
        metavar="watch|linearizable",
        autocompletion=lambda: ["watch", "linearizable"],
        envvar="ETCDFS_CONSISTENCY",
        rich_help_panel=_CACHE,
        show_default="watch",
        help="Show what the watch has brought; or ask etcd at each open that this is all.",
    ),
]
MaxStale = Annotated[
    str,
    typer.Option(
        metavar="S",
        envvar="ETCDFS_MAX_STALE",
        rich_help_panel=_CACHE,
        show_default="0: no limit",
        help="Show nothing any more when etcd has not been heard for so long (EIO).",
    ),
]
AuditInterval = Annotated[
    str,
    typer.Option(
        metavar="S",
        envvar="ETCDFS_AUDIT_INTERVAL",
        rich_help_panel=_CACHE,
        show_default="300",
        help="Compare the copy with etcd so often, and mend it; 0: never.",
    ),
]
Uid = Annotated[
    str,
    typer.Option(
        metavar="N",
        envvar="ETCDFS_UID",
        rich_help_panel=_PERMISSIONS,
        show_default="yours",
        help="Owner of every file.",
    ),
]
Gid = Annotated[
    str,
    typer.Option(
        metavar="N",
        envvar="ETCDFS_GID",
        rich_help_panel=_PERMISSIONS,
        show_default="yours",
        help="Group of every file.",
    ),
]
FileMode = Annotated[
    str,
    typer.Option(
        metavar="OCTAL",
        envvar="ETCDFS_FILE_MODE",
        rich_help_panel=_PERMISSIONS,
        show_default="0644",
        help="Permissions of files.",
    ),
]
DirMode = Annotated[
    str,
    typer.Option(
        metavar="OCTAL",
        envvar="ETCDFS_DIR_MODE",
        rich_help_panel=_PERMISSIONS,
        show_default="0755",
        help="Permissions of directories.",
    ),
]
Umask = Annotated[
    str,
    typer.Option(
        metavar="OCTAL",
        envvar="ETCDFS_UMASK",
        rich_help_panel=_PERMISSIONS,
        show_default="0",
        help="Permissions taken away from both.",
    ),
]
AllowOther = Annotated[
    bool,
    typer.Option(
        "--allow-other",
        envvar="ETCDFS_ALLOW_OTHER",
        rich_help_panel=_PERMISSIONS,
        help="Let other users in; needs user_allow_other in /etc/fuse.conf unless root.",
    ),
]
NoAttrs = Annotated[
    bool,
    typer.Option(
        "--no-attrs",
        envvar="ETCDFS_NO_ATTRS",
        rich_help_panel=_PERMISSIONS,
        help="Keep no attributes of files in etcd: no chmod, chown or symbolic links.",
    ),
]
LogLevel = Annotated[
    str,
    typer.Option(
        metavar="|".join(LEVELS),
        autocompletion=lambda: list(LEVELS),
        envvar="ETCDFS_LOG_LEVEL",
        rich_help_panel=_LOGGING,
        help="What is worth a line.",
    ),
]
LogFile = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        envvar="ETCDFS_LOG_FILE",
        rich_help_panel=_LOGGING,
        show_default="syslog; stderr with --foreground",
        help="Append the log to this file.",
    ),
]
MaxFileSize = Annotated[
    str,
    typer.Option(
        metavar="BYTES",
        envvar="ETCDFS_MAX_FILE_SIZE",
        rich_help_panel=_ADVANCED,
        show_default="1536K",
        help="Largest file; as etcd's --max-request-bytes.",
    ),
]
WriteBuffer = Annotated[
    str,
    typer.Option(
        metavar="BYTES",
        envvar="ETCDFS_WRITE_BUFFER",
        rich_help_panel=_ADVANCED,
        show_default="256M",
        help="Hold at most so much that is written and not published; a user a quarter of it.",
    ),
]
KernelTimeout = Annotated[
    str,
    typer.Option(
        metavar="S",
        envvar="ETCDFS_KERNEL_TIMEOUT",
        rich_help_panel=_ADVANCED,
        show_default="60",
        help="How long the kernel may go without asking again, should a notice be lost.",
    ),
]
SettleTimeout = Annotated[
    str,
    typer.Option(
        metavar="S",
        envvar="ETCDFS_SETTLE_TIMEOUT",
        rich_help_panel=_ADVANCED,
        show_default="2",
        help="How long a write waits for the watch to bring it back.",
    ),
]
WatchTimeout = Annotated[
    str,
    typer.Option(
        metavar="S",
        envvar="ETCDFS_WATCH_TIMEOUT",
        rich_help_panel=_ADVANCED,
        show_default="10",
        help="Ask etcd whether it is there when the watch has been silent for so long.",
    ),
]
UnmountTimeout = Annotated[
    str,
    typer.Option(
        "--timeout", metavar="S", show_default="30", help="How long to wait for the daemon's end."
    ),
]
InstallRoot = Annotated[
    Path,
    typer.Option(
        "--root",
        metavar="DIR",
        show_default="/",
        help="Put it all below this directory, as who builds a package does.",
    ),
]
RemoveHelper = Annotated[
    bool, typer.Option("--remove", help="Take away again what is there of this etcdfs.")
]
