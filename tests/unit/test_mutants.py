"""Which mistakes `make mutants` makes."""

from pathlib import Path

import pytest

from tests.mutants.sites import Mutant, find_mutants

SOURCE = '''
"""A text."""

LIMIT: int = 3


class Box:
    def __repr__(self) -> str:
        return "no" if 1 == 2 else "never"

    async def take(self, key: bytes, *, force: bool = False) -> bool:
        """Another text."""
        assert key != b""
        log.info("took %r", key)
        if not force and key in self.found:
            await self.lock(key)
            return key == b"ok"
        return "text"
'''

WANTED = [
    "box: | 3 -> (4)",
    "box:Box | False -> (True)",
    "box:Box.take | not force and key in self.found -> (not force or key in self.found)",
    "box:Box.take | not force -> (force)",
    "box:Box.take | key in self.found -> (key not in self.found)",
    "box:Box.take | await self.lock(key) -> pass",
    "box:Box.take | key == b'ok' -> (key != b'ok')",
    "box:Box.take | b'ok' -> (b'ok?')",
]


@pytest.fixture
def mutants(tmp_path: Path) -> list[Mutant]:
    (tmp_path / "box.py").write_text(SOURCE)
    return find_mutants(tmp_path, Path("box.py"))


def test_each_kind_of_mistake_and_nothing_that_no_test_should_pin_down(
    mutants: list[Mutant],
) -> None:
    assert [mutant.name for mutant in mutants] == WANTED


def test_a_mistake_is_one_change_of_one_place(mutants: list[Mutant]) -> None:
    source = SOURCE.encode()
    for mutant in mutants:
        changed = mutant.apply(source)
        compile(changed, "box.py", "exec")
        old, new = source.splitlines(), changed.splitlines()
        (line,) = (n for n, pair in enumerate(zip(old, new, strict=True), 1) if len(set(pair)) > 1)
        assert mutant.lines[0] <= line <= mutant.lines[1]


def test_a_change_elsewhere_moves_no_mistake_in_or_out_of_a_sample(
    tmp_path: Path, mutants: list[Mutant]
) -> None:
    (tmp_path / "box.py").write_text(f"FIRST: bytes = b'new'\n{SOURCE}")
    later = find_mutants(tmp_path, Path("box.py"))
    ranks = {mutant.name: mutant.rank(7) for mutant in later}
    assert len(ranks) == len(mutants) + 1
    assert all(ranks[mutant.name] == mutant.rank(7) for mutant in mutants)
    assert len({mutant.rank(seed) for mutant in mutants for seed in (7, 8)}) == 2 * len(mutants)
