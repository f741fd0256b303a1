"""Settings of a service in one file of a mount, always as they are now.

    settings = Settings("/mnt/etcd/app/settings.json")
    settings["greeting"]

A look at the file is one stat(2), which the kernel answers by itself while nothing changes. A file
that another client has changed has another inode number or time; it is read whole, so that all of
it is of one version. What cannot be read, or is no JSON, leaves the settings as they were.
"""

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Settings:
    """The file's content; a mapping that follows it."""

    def __init__(self, path: str) -> None:
        """Read the file, which must be there and make sense the first time."""
        self._path = Path(path)
        self._seen: tuple[int, int] | None = None
        self._values: dict[str, Any] = {}
        self._read()

    def __getitem__(self, name: str) -> Any:
        """Return a setting as it is now."""
        try:
            self._read()
        except (OSError, ValueError) as exc:
            log.warning("%s stays as it was: %s", self._path, exc)
        return self._values[name]

    def _read(self) -> None:
        found = self._path.stat()
        version = (found.st_ino, found.st_mtime_ns)
        if version != self._seen:
            self._values = json.loads(self._path.read_text(encoding="utf-8"))
            self._seen = version
