"""The Dockerfile and the manifests: well-formed, and their mounts seen where they are to be seen."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.support.etcd_process import EtcdProcess
from tests.support.nobody import needs_root
from tests.support.private_root import PrivateRoot

ROOT = Path(__file__).parents[3]
MANIFESTS = sorted((ROOT / "docs/examples/kubernetes").glob("*.yaml"))
KUBERNETES = "1.33"


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def pod_of(document: Any) -> Any:
    return (
        document["spec"]["template"]["spec"] if "template" in document["spec"] else document["spec"]
    )


@pytest.mark.programs("hadolint")
def test_the_dockerfile_is_well_formed() -> None:
    done = subprocess.run(
        ["hadolint", ROOT / "Dockerfile"], capture_output=True, check=False, text=True, timeout=50
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_built_from_all_that_makes_the_package() -> None:
    """Without setup.py it has no fast path and no manual pages, and nothing says so."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert {"etcdfs", "pyproject.toml", "setup.py", "README.md", "constraints.txt"} <= let_in


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_manifests_are_what_kubernetes_takes(path: Path) -> None:
    for document in documents(path):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_whoever_mounts_may_and_hands_it_on(path: Path) -> None:
    """Bidirectional takes `privileged`; who reads sees later mounts by HostToContainer."""
    kinds = set()
    for document in documents(path):
        pod = pod_of(document)
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            for volume in container.get("volumeMounts", ()):
                kind = volume.get("mountPropagation")
                kinds.add(kind)
                if kind == "Bidirectional":
                    assert container["securityContext"]["privileged"]
                    assert container["args"][0].startswith(f"{volume['mountPath']}/")
                    assert container.get("startupProbe") or container.get("readinessProbe")
    assert {"Bidirectional", "HostToContainer"} <= kinds


@needs_root
@pytest.mark.fuse
@pytest.mark.etcd
def test_a_mount_made_in_a_container_is_seen_outside_and_in_another(
    shared_etcd: EtcdProcess,
) -> None:
    """With the propagation that `rshared` and `rslave` (Bidirectional, HostToContainer) mean."""
    etcdfs = str(Path(sys.executable).with_name("etcdfs"))
    shared_etcd.etcdctl("put", "/containers/config", "value")
    with PrivateRoot() as host:
        host.run(
            """
            mkdir -p /mnt/etcdfs/etcd
            mount --bind /mnt/etcdfs /mnt/etcdfs
            mount --make-shared /mnt/etcdfs
            mkfifo /mnt/go
            unshare --mount --propagation slave sh -c 'read -r _ </mnt/go; cat /mnt/etcdfs/etcd/config' \
                >/mnt/read &
            unshare --mount --propagation unchanged \
                "$1" mount /mnt/etcdfs/etcd --cache --prefix /containers --endpoints "$2"
            test "$(cat /mnt/etcdfs/etcd/config)" = value
            echo >/mnt/go; wait
            """,
            etcdfs,
            shared_etcd.client_url,
        )
        assert host.run("cat /mnt/read") == "value"
        # A killed container leaves a dead mount, which the next one clears.
        host.run(
            """
            kill -KILL $(grep -l '^etcdfs ' /proc/[0-9]*/comm | cut -d/ -f3)
            unshare --mount --propagation unchanged \
                "$1" mount /mnt/etcdfs/etcd --cache --prefix /containers --endpoints "$2"
            test "$(cat /mnt/etcdfs/etcd/config)" = value
            "$1" umount /mnt/etcdfs/etcd
            """,
            etcdfs,
            shared_etcd.client_url,
        )
