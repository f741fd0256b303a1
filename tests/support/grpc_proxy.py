"""etcd's own proxy, `etcd grpc-proxy`, in front of an etcd of a test: many mounts, one client.

Knows: how it is started, and when it listens. Does not know: what goes through it.

Concurrency: plain blocking calls; a thread reads what it logs.
"""

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.support.etcd_process import EtcdProcess, free_port

_LISTENS: Final = "listening for gRPC proxy client requests"


@contextlib.contextmanager
def grpc_proxy(binary: Path, etcd: EtcdProcess) -> Iterator[str]:
    """Yield the URL of a proxy of an etcd."""
    address = f"127.0.0.1:{free_port()}"
    options = [f"--endpoints={etcd.endpoint}", f"--listen-addr={address}"]
    with subprocess.Popen(
        [binary, "grpc-proxy", "start", *options], stderr=subprocess.PIPE, text=True
    ) as proxy:
        try:
            assert proxy.stderr is not None
            said = []
            for line in proxy.stderr:
                said.append(line)
                if _LISTENS in line:
                    break
            else:
                raise AssertionError("".join(said))
            threading.Thread(target=list, args=(proxy.stderr,), daemon=True).start()
            yield f"http://{address}"
        finally:
            proxy.kill()
