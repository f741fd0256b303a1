"""The etcds of a run: one member, or three, each in a network namespace if that is possible.

Knows: how to start, freeze, kill, cut off, replace and restore members. Does not know: mounts.

Concurrency: blocking calls, each bounded. Only processes and namespaces made here are touched.
"""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, final

from tests.soak.control import until
from tests.soak.raw import Raw, RawError
from tests.support.etcd_process import restore_command

_START_S: Final = 60.0
_COMMAND_S: Final = 60.0
_RULES: Final = "soak"
_TIMERS: Final = ("--heartbeat-interval=50", "--election-timeout=500")


def run(*command: str | Path, allow: bool = False, stdin: str = "") -> str:
    """Run a command and return what it prints.

    Raises:
        RuntimeError: It failed, and that is not allowed.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCD")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_COMMAND_S,
        check=False,
        env=environment | {"ETCDCTL_API": "3"},
        input=stdin,
    )
    if done.returncode and not allow:
        raise RuntimeError(f"{command}: {done.stderr or done.stdout}")
    return done.stdout


def why_no_namespaces() -> str | None:
    """Return why members cannot have networks of their own, None if they can."""
    if os.geteuid():
        return "only root can make network namespaces"
    missing = [tool for tool in ("ip", "nft") if shutil.which(tool) is None]
    return f"there is no {missing[0]}" if missing else None


# --- networks -------------------------------------------------------------------------------


@final
class Network:
    """A bridge with one namespace per member; packets are dropped where they arrive.

    Attributes:
        gateway: The address of everybody who is no member.
    """

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        number = next(self._numbers)
        self._stem = f"soak{os.getpid() % 100_000}x{number}"[-12:]
        self._subnet = f"10.213.{os.getpid() % 125 * 2 + number % 2}"
        self.gateway = f"{self._subnet}.254"
        self._members: list[int] = []
        self._bridge = f"{self._stem}b"
        run("ip", "link", "add", self._bridge, "type", "bridge")
        run("ip", "addr", "add", f"{self.gateway}/24", "dev", self._bridge)
        run("ip", "link", "set", self._bridge, "up")

    def close(self) -> None:
        for member in self._members:
            run("ip", "netns", "del", self._namespace(member), allow=True)
        run("ip", "link", "del", self._bridge, allow=True)

    def add(self, member: int) -> str:
        """Make a member's namespace; return its address."""
        name, address = self._namespace(member), self.address(member)
        outside, inside = f"{self._stem}o{member}", f"{self._stem}i{member}"
        run("ip", "netns", "add", name)
        self._members.append(member)
        run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
        run("ip", "link", "set", inside, "netns", name)
        run("ip", "link", "set", outside, "master", self._bridge, "up")
        run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", inside)
        for device in (inside, "lo"):
            run("ip", "-n", name, "link", "set", device, "up")
        self._nft(member, "add", "table", "inet", _RULES)
        hook = "{ type filter hook input priority 0; }"
        self._nft(member, "add", "chain", "inet", _RULES, "input", hook)
        return address

    def address(self, member: int) -> str:
        return f"{self._subnet}.{member + 1}"

    def inside(self, member: int) -> tuple[str, ...]:
        """Return the words that make a command run in a member's namespace.

        Not `ip netns exec`: that gives the command a copy of all mounts, and a daemon whose mount
        is taken away goes on serving the copy.
        """
        return ("nsenter", f"--net=/run/netns/{self._namespace(member)}")

    def drop(self, member: int, *sources: str, share: str = "") -> None:
        """Drop what arrives at a member from these addresses, or a share of it."""
        for source in sources:
            rule = f"ip saddr {source} {share} drop"
            self._nft(member, "add", "rule", "inet", _RULES, "input", rule)

    def heal(self, member: int) -> None:
        self._nft(member, "flush", "chain", "inet", _RULES, "input")

    def _namespace(self, member: int) -> str:
        return f"{self._stem}m{member}"

    def _nft(self, member: int, *words: str) -> None:
        run(*self.inside(member), "nft", *words)


# --- members --------------------------------------------------------------------------------


@final
class Member:
    """One etcd process and its data."""

    def __init__(
        self, binary: Path, home: Path, number: int, host: str, inside: Sequence[str]
    ) -> None:
        self._binary = binary
        self._inside = tuple(inside)
        self.place = number  # in the network; one that replaces it takes it over
        self.name = f"m{number}"
        self.host = host
        self.home = home / self.name
        self.home.mkdir(exist_ok=True)
        self.data_dir = self.home / "data"
        self.endpoint = f"{host}:{2379 if inside else _free_port()}"
        self.peer_url = f"http://{host}:{2380 if inside else _free_port()}"
        self.wrapper: tuple[str, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{self.endpoint}"

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self, cluster: str, *arguments: str, state: str = "new") -> None:
        """Start it; does not wait."""
        command = (
            *self._inside,
            *self.wrapper,
            str(self._binary),
            f"--name={self.name}",
            f"--data-dir={self.data_dir}",
            f"--listen-client-urls={self.url}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={self.peer_url}",
            f"--initial-advertise-peer-urls={self.peer_url}",
            f"--initial-cluster={cluster}",
            f"--initial-cluster-state={state}",
            *_TIMERS,
            *arguments,
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCD")}
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def kill(self) -> None:
        """End it by SIGKILL; nothing when it is down."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(_COMMAND_S)
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wipe(self) -> None:
        """Delete its data."""
        self.kill()
        shutil.rmtree(self.data_dir, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@final
class Etcds:
    """All members of one cluster, of which there may be one."""

    def __init__(
        self, binary: Path, home: Path, size: int, *arguments: str, isolated: bool = False
    ) -> None:
        self._binary = binary
        self._home = home
        self._arguments = arguments
        self._release_options = self._options()
        self.network = Network() if isolated else None
        self._ids = itertools.count()
        self.members: list[Member] = []
        self.login: tuple[str, str] | None = None
        self._clients: dict[str, Raw] = {}
        try:
            for _ in range(size):
                self.members.append(self._new_member())
            cluster = self._cluster()
            for member in self.members:
                member.start(cluster, *self._all_arguments())
            self.until_ready()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        for member in self.members:
            member.kill()
        if self.network is not None:
            self.network.close()

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(member.endpoint for member in self.members)

    @property
    def url(self) -> str:
        """Return what `--endpoints` takes."""
        return ",".join(member.url for member in self.members)

    def raw(self, member: Member | None = None) -> Raw:
        """Return the client of one member, or one that takes turns."""
        name = "" if member is None else member.endpoint
        if name not in self._clients:
            endpoints = self.endpoints if member is None else (member.endpoint,)
            self._clients[name] = Raw(endpoints, self.login)
        return self._clients[name]

    def ask(self, question: Callable[[Raw], Any], patience_s: float = _START_S) -> Any:
        """Ask whichever member answers; asked again until one does (so only what may be)."""
        answers: list[Any] = []

        def answered() -> bool:
            with suppress(RawError):
                answers.append(question(self.raw()))
            return bool(answers)

        until(answered, "etcd answers", patience_s)
        return answers[0]

    def guard(self, root: tuple[str, str], *more: tuple[str, ...]) -> None:
        """Switch authentication on; from here on everything here is asked as root.

        Args:
            root: Its name, which must be `root`, and password.
            more: Further etcdctl commands before that.
        """
        self.ctl("user", "add", ":".join(root))
        self.ctl("user", "grant-role", root[0], "root")
        for words in more:
            self.ctl(*words)
        self.ctl("auth", "enable")
        self.login = root
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def ctl(self, *words: str, stdin: str = "") -> str:
        """Run etcdctl."""
        login = () if self.login is None else ("--user", ":".join(self.login))
        return run("etcdctl", f"--endpoints={self.url}", *login, *words, stdin=stdin)

    def until_ready(self) -> None:
        """Return when every member that runs answers a linearizable read."""
        for member in self.members:
            if member.running:
                client = self.raw(member)

                def answers(client: Raw = client) -> bool:
                    with suppress(RawError):
                        return bool(client.revision())
                    return False

                until(answers, f"{member.name} is ready", _START_S)

    def start(self, member: Member, state: str = "existing") -> None:
        """Start a member that was killed."""
        member.start(self._cluster(), *self._all_arguments(), state=state)

    def restart(self, member: Member) -> None:
        """Kill a member if it runs, start it, and wait until it answers."""
        member.kill()
        self.start(member)
        self.until_ready()

    def mend(self) -> None:
        """Undo what a fault that failed has left: members that are down, packets dropped."""
        for member in self.members:
            if self.network is not None:
                self.network.heal(member.place)
            if member.running:
                member.signal(signal.SIGCONT)
            else:
                self.start(member)
        self.until_ready()

    def leader(self) -> Member:
        """Return the member that leads."""

        def question(client: Raw) -> int:
            leader: int = client.status().leader
            if not leader:
                raise LookupError
            return leader

        found = 0
        for _ in range(100):
            with suppress(LookupError):
                found = self.ask(question)
                break
        for member in self.members:
            if member.running:
                with suppress(RawError):
                    if self.raw(member).status().header.member_id == found:
                        return member
        raise RuntimeError("nobody leads")

    def replace(self, member: Member) -> Member:
        """Take a member out of the cluster and put a new one, with no data, in its place."""
        others = [other for other in self.members if other is not member]
        identity = f"{self.raw(member).status().header.member_id:x}"
        member.kill()
        ctl = ("etcdctl", f"--endpoints={','.join(other.url for other in others)}")
        removing = (*ctl, "member", "remove", identity)
        until(lambda: self._reconfigured(*removing), "a member is removed", _START_S)
        self.members.remove(member)
        fresh = Member(
            self._binary,
            self._home,
            next(self._ids),
            member.host,
            () if self.network is None else self.network.inside(member.place),
        )
        fresh.place = member.place
        fresh.endpoint = member.endpoint  # where the clients look for it
        adding = (*ctl, "member", "add", fresh.name, f"--peer-urls={fresh.peer_url}")
        until(lambda: self._reconfigured(*adding), "a member is added", _START_S)
        self.members.insert(0, fresh)
        self._clients.pop("", None)
        fresh.start(self._cluster(), *self._all_arguments(), state="existing")
        self.until_ready()
        return fresh

    @contextmanager
    def learner(self) -> Iterator[Member]:
        """Yield a further member, which does not vote; it is taken out again."""
        fresh = self._new_member()
        ctl = ("etcdctl", f"--endpoints={self.url}", "member")
        adding = (*ctl, "add", fresh.name, f"--peer-urls={fresh.peer_url}", "--learner")
        until(lambda: self._reconfigured(*adding), "a learner is added", _START_S)
        cluster = f"{self._cluster()},{fresh.name}={fresh.peer_url}"
        fresh.start(cluster, *self._all_arguments(), state="existing")
        try:
            until(lambda: fresh.name in member_ids(self), "it has its name", _START_S)
            yield fresh
        finally:
            removing = (*ctl, "remove", f"{member_ids(self)[fresh.name]:x}")
            until(lambda: self._reconfigured(*removing), "it is removed", _START_S)
            fresh.kill()

    def save(self, path: Path) -> None:
        """Save a snapshot."""
        run("etcdctl", f"--endpoints={self.members[0].url}", "snapshot", "save", path)

    def restore(self, path: Path) -> None:
        """Put all members back to a snapshot, with the identities they had."""
        for member in self.members:
            member.wipe()
            run(
                *restore_command(self._binary, path, member.data_dir),
                *("--name", member.name),
                *("--initial-cluster", self._cluster()),
                *("--initial-advertise-peer-urls", member.peer_url),
            )  # fmt: skip
        for member in self.members:
            self.start(member, "new")
        self.until_ready()

    def log(self) -> str:
        return "\n".join(
            (member.home / "log").read_text(errors="replace")[-2000:] for member in self.members
        )

    def _reconfigured(self, *words: str) -> bool:
        """Change the cluster; False if it is not the moment: members are not yet sure of others."""
        try:
            run(*words)
        except RuntimeError as exc:
            moments = ("unhealthy", "started member", "deadline exceeded", "timed out", "leader")
            if any(moment in str(exc) for moment in moments):
                return False
            if "not found" in str(exc):  # the attempt before has done it, and could not say so
                return True
            raise
        return True

    def _new_member(self) -> Member:
        number = next(self._ids)
        if self.network is None:
            return Member(self._binary, self._home, number, "127.0.0.1", ())
        host = self.network.add(number)
        return Member(self._binary, self._home, number, host, self.network.inside(number))

    def _cluster(self) -> str:
        return ",".join(f"{member.name}={member.peer_url}" for member in self.members)

    def _all_arguments(self) -> tuple[str, ...]:
        return (*self._release_options, *self._arguments)

    def _options(self) -> tuple[str, ...]:
        done = subprocess.run(
            [self._binary, "--help"],
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
            check=False,
        )
        fast = "--unsafe-no-fsync"  # the machine's disk is not what is tested
        return (fast,) if fast in done.stdout + done.stderr else ()


def member_ids(etcds: Etcds) -> dict[str, int]:
    """Return etcd's numbers of the members, by name."""
    text = run("etcdctl", f"--endpoints={etcds.url}", "member", "list", "-w", "json")
    return {m.get("name", ""): m["ID"] for m in json.loads(text)["members"]}
