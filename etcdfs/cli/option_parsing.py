"""The option lists of mount(8), and what all texts together come to.

Knows: the lists of fstab and `-o`, and which options contradict one another. Does not know: where
the text comes from (command line, environment, fstab), and what the options are used for.

Concurrency: none; pure functions and frozen values.
"""

from dataclasses import dataclass
from typing import Final

from etcdfs.cli.option_values import OFF, ON, Texts, parse_endpoints, parse_fields
from etcdfs.cli.tls_options import asks_for_tls, read_security
from etcdfs.errors import UsageError
from etcdfs.options import OPEN, OPTIONS, Kind, MountOptions

# --- option lists, as in -o and fstab -------------------------------------------------------

_LISTED: Final = {name: row for name, row in OPTIONS.items() if not row.is_secret}

_BARE: Final = [name for name, row in _LISTED.items() if row.kind is Kind.FLAG and not row.default]

VALUED: Final = _LISTED.keys() - set(_BARE)
"""Options that take a value in a list."""

FLAGS: Final = {
    "ro": ("read-only", ON),
    "rw": ("read-only", OFF),
    "nocache": ("cache", OFF),
    **{name: (name, ON) for name in _BARE},
    **{f"no-{name}": (name, OFF) for name in _BARE if _LISTED[name].negatable},
}
"""What a list has without a value: the option, and its text."""

ALIASES: Final = {"username": "user"}
"""mount(8) takes `user=` in fstab for itself: it lets every user mount, and passes on less."""

KERNEL: Final = frozenset(
    {"nosuid", "nodev", "exec", "noexec", "atime", "noatime", "sync", "async", "dirsync"}
    | {"default_permissions", "nosymfollow"}
)
KERNEL_VALUED: Final = frozenset(
    {"fsname", "max_read", "context", "fscontext", "defcontext", "rootcontext"}
)

IGNORED: Final = frozenset(
    # For mount(8), systemd and the boot; they mean nothing once mounting has begun.
    {"defaults", "auto", "noauto", "fail", "nofail", "_netdev", "comment", "helper", "uhelper"}
    | {"user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup"}
    # How it is anyhow: links are followed, nothing is printed, there are no mandatory locks.
    | {"symfollow", "silent", "loud", "mand", "nomand", "iversion", "noiversion"}
    # Access times are not kept, however often they would be.
    | {"relatime", "norelatime", "strictatime", "nostrictatime", "lazytime", "nolazytime"}
    | {"diratime", "nodiratime"}
)

REFUSED: Final = {
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
        dashed = ALIASES.get(name, name.replace("_", "-"))
        valued = bool(equals) and dashed in VALUED
        if name in REFUSED:
            raise UsageError(f"-o {name} is refused: {REFUSED[name]}")
        if name in KERNEL_VALUED if equals else name in KERNEL:
            fuse_options.append(option)
        elif (name in IGNORED and not valued) or name.startswith(("x-", "X-")):
            continue
        elif dashed == "user" and ":" in value:  # not repeated
            raise UsageError(
                "-o user=NAME:PASSWORD is refused: others could see it; use password_file"
            )
        elif dashed in FLAGS and not equals:
            texts.update([FLAGS[dashed]])
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
    if name in FLAGS and has_value:
        return "it takes no value"
    return "there is no such option"


# --- all together ---------------------------------------------------------------------------


def read_options(mountpoint: str, texts: Texts, fuse_options: tuple[str, ...] = ()) -> MountOptions:
    """Put a mount's options together; what `texts` does not say keeps its default.

    The options of the log are passed over.

    Raises:
        CommandError: One of the texts cannot be understood, or two contradict one another.
    """
    values = parse_fields(MountOptions, texts)
    if "endpoints" in texts:
        values["endpoints"] = parse_endpoints(texts["endpoints"], tls=asks_for_tls(texts))
    values["security"] = read_security(texts)
    options = MountOptions(mountpoint=mountpoint, fuse_options=fuse_options, **values)
    _check_together(options)
    return options


def _check_together(options: MountOptions) -> None:
    """Refuse options of which one makes no sense with, or without, another.

    Raises:
        UsageError: There are such.
    """
    if options.embedded and options.endpoints:
        raise UsageError("--embedded starts an etcd of its own; --endpoints cannot go with it")
    if not options.embedded and not options.endpoints:
        raise UsageError("no endpoints: say --endpoints HOST:PORT, or --embedded")
    if options.embedded and options.security != OPEN:
        raise UsageError("--embedded starts an etcd of its own, without certificates or users")
    if options.data_dir is not None and not options.embedded:
        raise UsageError("--data-dir is where --embedded keeps its data; it needs --embedded")
    if options.state_dir is not None and (options.embedded or not options.cache):
        raise UsageError("--state-dir is for what --cache holds of an etcd that may be away")
    if options.offline_start and options.state_dir is None:
        raise UsageError("--offline-start mounts what is in --state-dir; it needs that")
