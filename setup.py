"""What pyproject.toml cannot say: the part of the package that is compiled, and files for a system.

pyfuse3 is compiled at the same time with the same tools, so that they are mostly there. Where they
are not, the package is installed without (`optional`), and the mount does without: it says so in
its log.
"""

import shlex
import subprocess
from pathlib import Path

from setuptools import Extension, setup


def ask(*arguments: str) -> list[str]:
    """Return what pkg-config says of libfuse; nothing where there is none of the two."""
    try:
        said = subprocess.run(["pkg-config", *arguments, "fuse3"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return shlex.split(said.stdout.decode())


def shared() -> list[tuple[str, list[str]]]:
    """Return what goes where man(1) looks that finds the command on PATH, and systems search.

    The package has it as well, for `etcdfs install-helper`.
    """
    top = Path("etcdfs/data")
    files = sorted(path for path in top.rglob("*") if path.is_file())
    return [(str(path.parent.relative_to(top)), [str(path)]) for path in files]


setup(
    data_files=shared(),
    ext_modules=[
        Extension(
            "etcdfs.fuse._fastpath",
            ["etcdfs/fuse/_fastpath.c"],
            depends=["setup.py"],
            # Warnings are for whoever changes it; who installs it has another compiler.
            extra_compile_args=[*ask("--cflags"), "-std=gnu11", "-fvisibility=hidden"],
            extra_link_args=[*ask("--libs"), "-ldl"],
            optional=True,
        )
    ],
)
