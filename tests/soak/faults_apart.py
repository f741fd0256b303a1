"""Faults that end one history of etcd and begin another, with nobody writing meanwhile.

Concurrency: the conductor's thread.
"""

from tests.soak import layout
from tests.soak.arena import Arena
from tests.soak.control import until
from tests.soak.faults_single import check, state_machine
from tests.soak.table import fault

WITNESS_S = 20.0
"""A watch that breaks is resumed within the longest pause, and the witnesses are read then."""


def change(arena: Arena, count: int, text: bytes) -> None:
    """Change keys, so many times; each has a revision of its own."""
    arena.etcds.ask(lambda client: client.revision())  # connected, after a restart
    for n in range(count):
        name = arena.chance.choice((*layout.SINGLE, *layout.CHURNED))
        arena.etcds.raw().put((layout.key(name), b"%s %d" % (text, n)))


@fault("9", "the data is wiped, and etcd restarted", "apart", WITNESS_S, history=False)
def wiped(arena: Arena) -> None:
    """Noticed at the reconnection, though etcd gives the same cluster id; the tree is replaced."""
    change(arena, 20, b"before")
    arena.reader.wait(arena.etcds.ask(lambda client: client.revision()))
    before = state_machine(arena.reader)
    for member in arena.etcds.members:
        member.wipe()
        arena.etcds.start(member, "new")
    arena.etcds.until_ready()
    change(arena, 3, b"after")
    until(
        lambda: state_machine(arena.reader)["lists"] > before["lists"],
        "it is listed again",
        WITNESS_S,
    )
    check("another history" in arena.reader.log(), "the log does not say so")


@fault("9", "the data is wiped, and filled again beyond", "apart", WITNESS_S, history=False)
def wiped_and_overtaken(arena: Arena) -> None:
    """Noticed by the witnesses, though our revision is there again."""
    change(arena, 10, b"before")
    revision = arena.etcds.ask(lambda client: client.revision())
    arena.reader.wait(revision)
    arena.wires_down()
    try:
        for member in arena.etcds.members:
            member.wipe()
            arena.etcds.start(member, "new")
        arena.etcds.until_ready()
        change(arena, revision + 20, b"after")
    finally:
        arena.wires_up()


@fault("10", "restored from a snapshot, and overtaken", "apart", WITNESS_S, history=False)
def restored(arena: Arena) -> None:
    """Noticed by the witnesses: no file shows what is not in etcd any more."""
    change(arena, 10, b"saved")
    snapshot = arena.home / f"snapshot{arena.chance.random()}"
    arena.etcds.save(snapshot)
    change(arena, 10, b"lost")
    arena.reader.wait(arena.etcds.ask(lambda client: client.revision()))
    arena.wires_down()
    try:
        arena.etcds.restore(snapshot)
        change(arena, 40, b"new")
    finally:
        arena.wires_up()
