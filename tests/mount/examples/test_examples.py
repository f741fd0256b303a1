"""The examples of docs/examples, as they are there, on a machine of the test's own."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from etcdfs.cli.install import DATA
from tests.mount.client import Client
from tests.mount.lab import Lab
from tests.support.etcd_process import EtcdProcess, free_port
from tests.support.nobody import needs_root
from tests.support.private_root import PrivateRoot

pytestmark = [pytest.mark.fuse, pytest.mark.etcd]

EXAMPLES = Path(__file__).parents[3] / "docs/examples"


@pytest.fixture
def client(shared_etcd: EtcdProcess) -> Iterator[Client]:
    client = Client(shared_etcd.endpoint)
    yield client
    client.close()


@pytest.fixture
def machine(shared_etcd: EtcdProcess) -> Iterator[PrivateRoot]:
    """A machine with a mount on /mnt/etcd."""
    with PrivateRoot() as machine:
        etcdfs = str(Path(sys.executable).with_name("etcdfs"))
        script = 'mkdir /mnt/etcd; "$1" mount /mnt/etcd --cache --allow-other --endpoints "$2"'
        machine.run(script, etcdfs, shared_etcd.client_url)
        yield machine
        machine.run('"$1" umount --lazy /mnt/etcd', etcdfs)


def shown(machine: PrivateRoot, revision: int) -> None:
    """Return once the mount shows a revision."""
    wait = "import os, sys; os.getxattr('/mnt/etcd', f'user.etcdfs.wait.{sys.argv[1]}')"
    machine.run('"$1" -c "$2" "$3"', sys.executable, wait, str(revision))


# --- nginx ----------------------------------------------------------------------------------


_UNTIL_IT_ENDS = """
import os, select, subprocess, sys
fd = os.pidfd_open(int(sys.argv[1]))
subprocess.run(sys.argv[2:], check=True)
poll = select.poll()
poll.register(fd, select.POLLIN)
assert poll.poll(30_000)
"""


@needs_root
@pytest.mark.programs("nginx", "curl", "pgrep")
def test_nginx_with_its_sites_in_etcd(machine: PrivateRoot, client: Client, tmp_path: Path) -> None:
    port = free_port()

    def site(text: str) -> None:
        body = f"server {{ listen 127.0.0.1:{port}; return 200 '{text}'; }}"
        shown(machine, client.put(b"/nginx/sites/one.conf", body.encode()))

    config = str(EXAMPLES / "nginx" / "nginx.conf")
    nginx = f"nginx -p {tmp_path} -c {config}"
    ask = f"curl -sS --retry 10 --retry-connrefused --max-time 20 http://127.0.0.1:{port}/"
    site("first")
    machine.run(f"{nginx} 2>/dev/null")
    try:
        assert machine.run(ask) == "first"
        site("second")
        machine.run(f"{nginx} -t 2>/dev/null")
        worker = machine.run(f"pgrep -P $(cat {tmp_path}/nginx.pid)").strip()
        # It ends when there is another, and a connection of its own is no longer taken.
        machine.run(
            f'"$1" -c "$2" {worker} {nginx} -s reload 2>/dev/null', sys.executable, _UNTIL_IT_ENDS
        )
        assert machine.run(ask) == "second"
        shown(machine, client.put(b"/nginx/sites/one.conf", b"server { listen "))
        assert machine.attempt(f"{nginx} -t").returncode != 0
    finally:
        machine.run(f"kill $(cat {tmp_path}/nginx.pid)")


# --- a service in Python --------------------------------------------------------------------


def settings_of(path: Path) -> Any:
    file = EXAMPLES / "python" / "settings.py"
    spec = importlib.util.spec_from_file_location("settings_example", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Settings(str(path))


@pytest.mark.expect_log("%s stays as it was: %s")
def test_a_service_whose_settings_follow_a_key(lab: Lab) -> None:
    def put(value: object) -> None:
        lab.put("settings.json", json.dumps(value).encode())

    put({"greeting": "hello"})
    settings = settings_of(lab.path / "settings.json")
    assert settings["greeting"] == "hello"
    put({"greeting": "hallo"})
    assert settings["greeting"] == "hallo"
    lab.put("settings.json", b"{")
    assert settings["greeting"] == "hallo"
    lab.delete("settings.json")
    assert settings["greeting"] == "hallo"
    put({"greeting": "moin"})
    assert settings["greeting"] == "moin"


def test_a_look_at_settings_that_did_not_change_asks_nobody(cached: Lab) -> None:
    cached.put("settings.json", b'{"greeting": "hello"}')
    settings = settings_of(cached.path / "settings.json")
    assert settings["greeting"] == "hello"
    with cached.mounted.counting() as counted:
        for _ in range(100):
            assert settings["greeting"] == "hello"
    assert not counted


# --- systemd --------------------------------------------------------------------------------


@needs_root
@pytest.mark.programs("systemd-analyze")
def test_a_unit_whose_environment_is_a_key(machine: PrivateRoot, client: Client) -> None:
    shown(machine, client.put(b"/app/env", b"GREETING=hello\n"))
    unit = (EXAMPLES / "systemd" / "app.service").read_text()
    machine.run(
        """
        mkdir -p /usr/local/bin /etc/systemd/system
        ln -sf "$1" /usr/local/bin/etcdfs
        cp "$2" /etc/systemd/system/etcdfs@.service
        cp "$3" /etc/systemd/system/app.service
        systemd-analyze verify --man=no app.service etcdfs@mnt-etcd.service
        """,
        str(Path(sys.executable).with_name("etcdfs")),
        str(DATA / "lib/systemd/system/etcdfs@.service"),
        str(EXAMPLES / "systemd" / "app.service"),
    )
    # There is no systemd here to start it: a shell reads the file, and runs the command.
    (file,) = re.findall(r"^EnvironmentFile=(.*)$", unit, re.MULTILINE)
    (command,) = re.findall(r"^ExecStart=(.*); exec sleep infinity'$", unit, re.MULTILINE)
    assert machine.run(f"set -a; . {file}; {command}'") == "hello\n"


# --- bind mounts, as containers have them ---------------------------------------------------


@needs_root
def test_bind_mounts_of_a_file_and_of_a_directory(machine: PrivateRoot, client: Client) -> None:
    """`docker run -v /mnt/etcd/app/config:/config -v /mnt/etcd/app:/app`."""
    shown(machine, client.put(b"/app/config", b"one\n"))
    machine.run(
        """
        mkdir /mnt/app; touch /mnt/config
        mount --bind /mnt/etcd/app/config /mnt/config
        mount --bind /mnt/etcd/app /mnt/app
        """
    )
    read = "cat /mnt/config /mnt/app/config"
    assert machine.run(read) == "one\none\n"
    shown(machine, client.put(b"/app/config", b"two\n"))
    assert machine.run(read) == "two\ntwo\n"
    client.put(b"/app/other", b"new\n")
    shown(machine, client.delete(b"/app/config"))
    assert machine.attempt("cat /mnt/app/config").returncode != 0
    assert "other" in machine.run("ls /mnt/app").split()
    shown(machine, client.put(b"/app/config", b"back\n"))
    assert machine.run(read) == "back\nback\n"
    machine.run("umount /mnt/config /mnt/app")
