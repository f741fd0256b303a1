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
mkdir -p /mnt/etcdfs/etcd
etcdfs mount /mnt/etcdfs/etcd
cat /mnt/etcdfs/etcd/greeting /mnt/etcdfs/etcd/.etcdfs/status /opt/etcdfs/share/man/man1/etcdfs.1
etcdfs umount /mnt/etcdfs/etcd
"""
"""What is seen of it outside is another test's: buildah does without propagation."""


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


@pytest.mark.timeout(1500)
def test_the_image_is_built_and_mounts(etcd_binary: Path, home: Path) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    (base,) = set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE))
    environment = os.environ | {
        "BASE": f"docker.io/library/{base}",
        "BUILDAH_ISOLATION": "chroot",
        "PYTHON": sys.executable,
        "ROOT": str(ROOT),
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
        options = ["--network=host", "--env", f"ETCDFS_ENDPOINTS={etcd.client_url}"]
        command = ["buildah", "run", *options, container, "sh", "-euc", MOUNT]
        said = run('exec "$@"', *command, env=environment)
    assert said.startswith("hello{")
    assert '"mode": "cache"' in said
    assert '"EXACT"' in said, "the fast path is in use"
    assert ".TH" in said, "the manual pages are there"
