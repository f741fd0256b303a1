"""The list of faults: each with its number, where it is made, and what must happen.

Knows: how a fault is declared. The numbers are those of the list of thirty that the project set out
to survive; a `+` marks what is on it without a number. The docstring of each injector says what
must happen; what is the same for all is checked by the conductor after each: the mount equals etcd,
key by key, within the bound; no read failed; nothing is stale, torn, inverted or lost; no request
is left without an answer.

Concurrency: a table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.soak.arena import Arena

Injector = Callable[[Arena], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        number: Its number on the list.
        name: What happens, in a few words.
        arena: Where: `single`, `cluster`, `tamper` (all under load), `apart` or `guarded` (without).
        bound_s: How long after it the mounts may take to equal etcd.
        inject: Makes it happen, and checks what is special about it.
        history: Whether etcd's history goes on.
        reads_fail: Whether reads may fail meanwhile.
    """

    number: str
    name: str
    arena: str
    bound_s: float
    inject: Injector
    history: bool = True
    reads_fail: bool = False

    @property
    def title(self) -> str:
        return f"{self.number} {self.name}"

    @property
    def expected(self) -> str:
        return " ".join((self.inject.__doc__ or "").split())


FAULTS: Final[list[Fault]] = []

ELSEWHERE: Final = {
    "another address for a name": "tests/integration/test_failover.py"
    "::test_a_name_that_leads_elsewhere_is_followed",
    "certificates that are replaced": "tests/integration/test_security.py"
    "::test_certificates_are_rotated_under_a_store",
    "a certificate that expires": "tests/integration/test_security.py::test_an_expired_certificate",
    "memory runs out": "Linux then ends the daemon by SIGKILL, so it is as fault 29",
    "two watches on one stream": "etcdfs opens one watch per stream, so there is no such thing",
}
"""What is on the list and not made here: the test that does, or why there is none."""


def fault(
    number: str,
    name: str,
    arena: str,
    bound_s: float,
    *,
    history: bool = True,
    reads_fail: bool = False,
) -> Callable[[Injector], Injector]:
    """Put an injector on the list."""

    def register(inject: Injector) -> Injector:
        FAULTS.append(
            Fault(
                number=number,
                name=name,
                arena=arena,
                bound_s=bound_s,
                inject=inject,
                history=history,
                reads_fail=reads_fail,
            )
        )
        return inject

    return register
