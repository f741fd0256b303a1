"""What the system looks for in directories of its own: the helper of mount(8), a unit, pages.

Knows: which file of the package belongs where, and how it gets there and away again. Does not know:
what is in the files.

A Python environment is a place that mount(8), systemd, man(1) and shells do not search. The two
commands are links to this environment's; everything else is copied, so that a machine can boot
before that is there, and has to be copied again after an upgrade.

Concurrency: plain blocking calls.
"""

import contextlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import etcdfs
from etcdfs.cli.argv import HELPER
from etcdfs.errors import InstallError

DATA: Final = Path(etcdfs.__path__[0]) / "data"
"""The files of the package that are no Python, in directories as they are below /usr/local."""

_COMMAND: Final = "etcdfs"
_SBIN: Final = Path("sbin")  # where mount(8) looks for helpers, and only there
_LOCAL: Final = Path("usr/local")
_MODE: Final = 0o644


def find_command(called_as: str) -> Path:
    """Return the absolute path of the command `etcdfs` that runs.

    Args:
        called_as: `sys.argv[0]`.

    Raises:
        InstallError: There is none, only modules.
    """
    given = Path(called_as)
    scripts = Path(sysconfig.get_path("scripts"))
    candidates = [given] if given.name == _COMMAND else []
    for path in (*candidates, scripts / _COMMAND):
        if path.is_file() and os.access(path, os.X_OK):
            return Path(os.path.realpath(path))
    raise InstallError(f"there is no command {_COMMAND} in {scripts}: install the package first")


def install_files(command: Path, root: Path) -> list[Path]:
    """Put everything in its place, over what an earlier version left there.

    Args:
        command: What the two commands become links to.
        root: What the places are below; `/`, or where a package is made.

    Returns:
        What is there now, in order.

    Raises:
        InstallError: A place cannot be written to, or holds what is not ours.
    """
    done = []
    for place, source in _files(root, command):
        with _told(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            if source is None:
                _staleness(place, command)
            else:
                _copy(place, source)
        done.append(place)
    return done


def remove_files(command: Path, root: Path) -> list[Path]:
    """Take away what `install_files` puts there; what is not there, or another's, is left alone.

    Returns:
        What was taken away.

    Raises:
        InstallError: A place cannot be written to.
    """
    done = []
    for place, source in _files(root, command):
        ours = place.is_symlink() if source is None else place.is_file()
        if ours and (source is not None or _leads_to(place, command)):
            with _told(place):
                place.unlink()
            done.append(place)
    return done


def strangers(command: Path) -> list[Path]:
    """Return what another user than root could change, on the way to a command that root runs."""
    real = Path(os.path.realpath(command))
    return [path for path in (real, *real.parents) if _is_open(path)]


def _is_open(path: Path) -> bool:
    status = path.stat()
    sticky = status.st_mode & 0o1000
    return status.st_uid != 0 or (bool(status.st_mode & 0o022) and not sticky)


def _files(root: Path, command: Path) -> Iterator[tuple[Path, Path | None]]:
    """Yield each place and the file for it; None for a link to the command."""
    yield root / _SBIN / HELPER, None
    own = root / _LOCAL / "bin" / _COMMAND
    if own != command:  # it was installed there to begin with
        yield own, None
    for source in sorted(path for path in DATA.rglob("*") if path.is_file()):
        yield root / _LOCAL / source.relative_to(DATA), source


def _leads_to(place: Path, command: Path) -> bool:
    return Path(os.path.realpath(place)) == command


def _staleness(place: Path, command: Path) -> None:
    if place.exists() and not place.is_symlink():
        raise InstallError(f"{place} is there already, and is no link of ours")
    _put(place, lambda new: new.symlink_to(command))


def _copy(place: Path, source: Path) -> None:
    def write(new: Path) -> None:
        new.write_bytes(source.read_bytes())
        new.chmod(_MODE)

    _put(place, write)


def _put(place: Path, make: Callable[[Path], object]) -> None:
    """Make a file beside its place and move it there: nobody finds half of it."""
    new = place.with_name(f".{place.name}.new")
    new.unlink(missing_ok=True)
    try:
        make(new)
        new.replace(place)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise InstallError(f"{place}: {exc.strerror}") from None
