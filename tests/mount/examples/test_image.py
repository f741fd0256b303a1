"""The Dockerfile is built, and what comes of it mounts. Minutes, and a gigabyte: nightly.

The image that it begins with cannot be had everywhere. Debian's own files take its name here, with
Debian's Python, and with what pip would fetch, made by this Python.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pytest

from tests.support.etcd_process import EtcdProcess
from tests.support.nobody import needs_root

ROOT = Path(__file__).parents[3]
SUITES = {(3, 11): "bookworm", (3, 13): "trixie"}
"""The release of Debian whose Python takes what this one compiles."""

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.etcd,
    needs_root,
    pytest.mark.programs("buildah", "debootstrap"),
    pytest.mark.skipif(
        os.environ.get("HYPOTHESIS_PROFILE") != "nightly", reason="it takes minutes: nightly"
    ),
    pytest.mark.skipif(sys.version_info[:2] not in SUITES, reason="no Debian has this Python"),
]

BUILD = """
debootstrap --variant=minbase --include=python3-dev,python3-venv "$SUITE" base \
    http://deb.debian.org/debian
ln -s python3 base/usr/bin/python
"$PYTHON" -m pip wheel -q -c "$ROOT/constraints.txt" -w base/wheels "$ROOT" 'setuptools>=77'
rm base/wheels/etcdfs-*
echo '{"default": [{"type": "insecureAcceptAnything"}]}' >policy
container=$(buildah from scratch)
buildah add -q "$container" base /
buildah config --env PIP_NO_INDEX=1 --env PIP_FIND_LINKS=/wheels "$container"
buildah commit -q --signature-policy policy --rm "$container" "$BASE"
rm -r base
buildah bud -q --pull-never --signature-policy policy -t etcdfs "$ROOT"
buildah from --pull-never --cap-add CAP_SYS_ADMIN --device /dev/fuse etcdfs
"""

MOUNT = """
etcdfs mount /mnt/etcdfs/etcd >&2
getfattr() { python -c 'import os, sys; print(os.getxattr(*sys.argv[1:]).decode())' "$@"; }
getfattr /mnt/etcdfs/etcd user.etcdfs.statistics | tr -d '\\n'; echo
ls /opt/etcdfs/share/man/man1/etcdfs-mount.1
read -r _
etcdfs umount /mnt/etcdfs/etcd
"""


def run(script: str, *arguments: object, **more: object) -> str:
    done = subprocess.run(
        ["sh", "-euc", script, "sh", *map(str, arguments)],
        capture_output=True,
        check=False,
        text=True,
        timeout=1200,
        **more,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return str(done.stdout)


@pytest.fixture
def home() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="etcdfs-test-image-"))
    yield made
    rmtree(made, ignore_errors=True)


@pytest.fixture
def shared(home: Path) -> Iterator[Path]:
    """A directory whose mounts are seen by whoever is given it, and the other way round."""
    place = home / "shared"
    (place / "etcd").mkdir(parents=True)
    run('mount --bind "$1" "$1"; mount --make-shared "$1"', place)
    yield place
    run('umount -l "$1/etcd" 2>/dev/null || true; umount -l "$1"', place)


@pytest.mark.timeout(1500)
def test_the_image_is_built_and_mounts(etcd_binary: Path, home: Path, shared: Path) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    (base,) = set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE))
    environment = os.environ | {
        "BASE": f"docker.io/library/{base}",
        "BUILDAH_ISOLATION": "chroot",
        "PYTHON": sys.executable,
        "ROOT": str(ROOT),
        "STORAGE_DRIVER": "vfs",
        "SUITE": SUITES[sys.version_info[:2]],
        "XDG_RUNTIME_DIR": str(home),
    }
    (home / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{home}/graph"\nrunroot = "{home}/run"\n'
    )
    environment["CONTAINERS_STORAGE_CONF"] = str(home / "storage.conf")
    container = run(BUILD, cwd=home, env=environment).splitlines()[-1]
    asked = 'buildah inspect --format "{{.OCIv1.Config.Entrypoint}} {{.OCIv1.Config.Cmd}}" "$1"'
    said = run(asked, container, cwd=home, env=environment)
    assert said.strip() == "[etcdfs mount --foreground] [/mnt/etcdfs/etcd]"
    with EtcdProcess(etcd_binary) as etcd:
        etcd.etcdctl("put", "/greeting", "hello")
        options = ["--network=host", "-v", f"{shared}:/mnt/etcdfs:rshared"]
        options += ["--env", f"ETCDFS_ENDPOINTS={etcd.client_url}"]
        with subprocess.Popen(
            ["buildah", "run", *options, container, "sh", "-euc", MOUNT],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as running:
            assert running.stdout is not None
            status = running.stdout.readline()
            assert '"fast_path": ["EXACT"' in status, status
            assert '"mode": "cache"' in status
            assert (shared / "etcd" / "greeting").read_text() == "hello", "it is seen outside"
            _, _ = running.communicate("go on\n", timeout=100)
            assert running.returncode == 0
        assert not (shared / "etcd" / "greeting").exists()
