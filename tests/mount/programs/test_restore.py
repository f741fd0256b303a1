"""A keyspace of every kind of key is copied out, removed, and copied back by the usual tools."""

import contextlib
import os
from pathlib import Path

import pytest

from tests.mount.client import Client
from tests.mount.lab import MODES, Pool, memory_directory, sh
from tests.support.etcd_process import EtcdProcess

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

LONG = b"l" * 300
RELS = (
    b"plain",
    b"deep/er/file",
    b"empty",
    b"a//b",
    b"a/c",
    b"a//c//",
    b"///",
    b"./x",
    b"d/..",
    b"m/",
    b"m//1",
    b"v",
    b"v/w",
    b"%value",
    b"%=.",
    b".etcdfs/x",
    b"nul\0here/x",
    b"new\nline",
    b"\xff\xfe",
    LONG,
    LONG + b"/below",
    LONG + b"\0.%=lll.R4nd0m",
    LONG * 3 + b"%",
    b"%+" + b"x" * 253,
)
TOOLS = {
    "cp": ("cp -a {mount}/. {copy}/", "cp -a {copy}/. {mount}/"),
    "tar": ("tar -C {mount} -cf {copy}/tar .", "tar -C {mount} -xpf {copy}/tar"),
    "rsync": ("rsync -a {mount}/ {copy}/", "rsync -a {copy}/ {mount}/"),
}


@pytest.mark.many_calls
@pytest.mark.programs("cp", "rsync", "tar")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefix", ["/", ""], ids=["slash", "raw"])
def test_b8_a_keyspace_is_copied_out_and_back(
    pool: Pool, own_etcd: EtcdProcess, mode: str, prefix: str
) -> None:
    keys = {b"/" + rel: b"" if rel == b"empty" else b"=" + rel for rel in RELS}
    if not prefix:
        keys |= {b"no-slash/x": b"raw", b"a": b"raw", b"a/": b"raw"}
    with (
        contextlib.closing(Client(own_etcd.endpoint)) as client,
        pool.private(own_etcd, mode, "--prefix", prefix) as mounted,
    ):
        mounted.wait(client.put_all(keys.items()))
        for name, (there, back) in TOOLS.items():
            with memory_directory() as copy:
                sh(copy, there.format(mount=mounted.path, copy=copy))
                sh(mounted.path, "find . -mindepth 1 -delete")
                assert os.listdir(mounted.path) == [], name
                assert set(found(client)) <= {os.fsencode(prefix)}, name
                sh(copy, back.format(mount=mounted.path, copy=copy))
                assert only_made(found(client), keys) == keys, name
                if name == "rsync":
                    assert transferred(copy, mounted.path) == []


def found(client: Client) -> dict[bytes, bytes]:
    """Return all keys but those of attributes."""
    entries = client.below(b"")
    return {e.key: e.value for e in entries if not e.key.startswith(b"/.etcdfs/attrs/")}


def only_made(found: dict[bytes, bytes], keys: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Leave out the markers that mkdir(2) has put for directories that were only implied."""
    implied = {key[: at + 1] for key in keys for at, byte in enumerate(key) if byte == ord("/")}
    return {key: value for key, value in found.items() if value or key not in implied - keys.keys()}


def transferred(copy: Path, path: Path) -> list[str]:
    lines = sh(copy, f"rsync -ain {copy}/ {path}/").splitlines()
    return [line for line in lines if line.startswith(">")]
