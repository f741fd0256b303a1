"""`python -m tests.mutants`: are there tests that notice a mistake? See `make mutants`.

A sample of all mutants (`sites`) of the packages is taken. Each is put into a copy of the tree,
where the quick tests that run its line are run, the quickest first, until one fails: it is killed.
So is one that takes far longer than the tests do. What is left is a missing test, code that nobody
needs, or a change without effect; `left.toml` has the reason for each that stays.

Exit codes:
    0: Enough are killed, and each that is left has its reason.
    1: Not so.
    2: The tests fail without any mutant.
"""

import argparse
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar, Final, final

import pytest
from coverage import CoverageData

from tests.mutants.sites import Mutant, find_mutants

ROOT: Final = Path(__file__).parent.parent.parent
LEFT: Final = Path(__file__).parent / "left.toml"
TESTS: Final = ("tests/unit", "tests/service", "tests/stateful")
"""The quick tests of `make check`; those that the same tests would run on a mount are not asked."""

WANTED: Final = 0.95
"""The part of a sample that has to be killed."""

_SPARE: Final = 4
"""How many times the processor time that the tests take without it a mutant may use, ..."""
_SPARE_S: Final = 30
"""... besides as much as it takes to load everything on a slow machine."""
_HANGS_S: Final = 60
"""After how long a single test that uses no processor time hangs (all of them take 20 s at most)."""
_OPTIONS: Final = (
    *("-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider"),
    *("-p", "tests.mutants.plugin"),
)
_LOADED: Final = (
    *("pytest", "pytest_trio", "hypothesis.stateful", "hypothesis.strategies", "trio.testing"),
    *("aetcd.rpc", "cachetools", "grpc", "outcome", "pyfuse3"),
)
"""What the tests load besides our own, most of it in a second and more."""
_OURS: Final = ("etcdfs", "tests", "benchmarks")
_TREE: Final = ("etcdfs", "tests", "benchmarks", "docs", "pyproject.toml", "README.md", "Makefile")


@final
@dataclass
class Record:
    """What the quick tests run when there is no mutant.

    Attributes:
        seconds: The processor time of each test.
        lines: For each module, the tests that run each of its lines.
    """

    seconds: dict[str, float]
    lines: dict[Path, dict[int, set[str]]] = field(default_factory=dict)

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Return the tests that run a mutant's line, the quickest first.

        What is run at the import of the module belongs to all that use the module.
        """
        lines = self.lines.get(mutant.file, {})
        first, last = mutant.lines
        there = set[str]().union(*(lines.get(n, ()) for n in range(first, last + 1)))
        if "" in there:
            there = set[str]().union(*lines.values())
        return sorted(there - {""}, key=lambda test: (self.seconds[test], test))


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(prog="make mutants")
    parser.add_argument("paths", nargs="+", type=Path, help="packages or modules to change")
    parser.add_argument("--count", type=int, default=200, help="how many mutants")
    parser.add_argument("--sample", type=int, default=0, help="another number, another sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at once")
    parser.add_argument("--only", default="", help="only mutants whose name has this text")
    parser.add_argument("--record", type=Path, help="a directory: what the tests run, kept there")
    arguments = parser.parse_args()
    everything = [
        mutant for file in _modules(arguments.paths) for mutant in find_mutants(ROOT, file)
    ]
    reasons = _reasons(everything)
    sample = sorted(everything, key=lambda mutant: mutant.rank(arguments.sample))
    sample = [mutant for mutant in sample if arguments.only in mutant.name][: arguments.count]
    _say(f"{len(sample)} of {len(everything)} mutants, sample {arguments.sample}")
    with tempfile.TemporaryDirectory(prefix="etcdfs-mutants-") as home:
        directory = arguments.record or Path(home)
        record = _record(directory)
        if record is None:
            return 2
        with ProcessPoolExecutor(
            arguments.jobs, get_context("fork"), _Job.begin, (record, directory / "tree", home)
        ) as pool:
            ends = list(pool.map(_Job.try_one, sample))
    return _report(dict(zip(sample, ends, strict=True)), reasons)


def _modules(paths: Iterable[Path]) -> list[Path]:
    """Return the modules in packages, relative to the root."""
    found = [
        path for given in paths for path in (given.rglob("*.py") if given.is_dir() else [given])
    ]
    return sorted(path.resolve().relative_to(ROOT) for path in found)


def _reasons(everything: list[Mutant]) -> dict[str, str]:
    """Return why some mutants are left, by name.

    Raises:
        SystemExit: A reason is that of no mutant, or is none.
    """
    reasons: dict[str, str] = tomllib.loads(LEFT.read_text()) if LEFT.exists() else {}
    names = {mutant.name for mutant in everything}
    modules = {name.partition(":")[0] for name in names}
    stale = [name for name in reasons if name not in names and _is_in(name, modules)]
    if stale or not all(reasons.values()):
        sys.exit("\n".join(["left.toml has reasons for no mutant:", *stale]))
    return reasons


def _is_in(name: str, modules: set[str]) -> bool:
    """Tell whether a name is that of a mutant in one of these modules, or in none that there is."""
    module = name.partition(":")[0]
    return module in modules or not (ROOT / f"{module.replace('.', '/')}.py").exists()


# --- the tests without a mutant ---------------------------------------------------------------


def _record(directory: Path) -> Record | None:
    """Run all quick tests once, unless that was done; None if they fail."""
    directory.mkdir(exist_ok=True)
    if not (directory / "seconds").exists():
        tree = _copy(ROOT, directory / "tree")
        environment = {"MUTANTS_RECORD": str(directory.resolve()), "COVERAGE_CORE": "ctrace"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *_OPTIONS, *TESTS],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree.resolve()), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            _say(done.stdout)
            return None
    record = Record(json.loads((directory / "seconds").read_text()))
    data = CoverageData(str(directory / "coverage"))
    data.read()
    for file in data.measured_files():
        by_line: defaultdict[int, set[str]] = defaultdict(set)
        for line, tests in data.contexts_by_lineno(file).items():
            by_line[line].update(tests)
        record.lines[Path(file).relative_to(directory.resolve() / "tree")] = by_line
    return record


def _copy(root: Path, tree: Path) -> Path:
    """Copy what the tests need, with what Python has compiled of it."""
    for name in _TREE:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, tree / name)
        else:
            tree.mkdir(exist_ok=True)
            shutil.copy2(source, tree / name)
    return tree


# --- one mutant -------------------------------------------------------------------------------


class _Job:
    """A process that tries mutants, each in a child: what takes long to load is loaded once."""

    one: ClassVar["_Job"]

    def __init__(self, record: Record, tree: Path) -> None:
        self._record = record
        self._tree = tree

    @classmethod
    def begin(cls, record: Record, tree: Path, home: str) -> None:
        """Make this process a job, with a tree of its own."""
        os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
        for name in _LOADED:
            importlib.import_module(name)
        cls.one = cls(record, _copy(tree, Path(home) / f"tree{os.getpid()}"))

    @classmethod
    def try_one(cls, mutant: Mutant) -> str:
        """Return how a mutant ended: `killed by ...`, or `left ...`."""
        tests = cls.one._record.tests_of(mutant)
        end = cls.one._try(mutant, tests) if tests else "left: no quick test runs it"
        _say(f"{end}\n    {mutant.name}")
        return end

    def _try(self, mutant: Mutant, tests: list[str]) -> str:
        module = self._tree / mutant.file
        source, times = module.read_bytes(), module.stat()
        try:
            module.write_bytes(mutant.apply(source))
            return self._run(tests)
        finally:
            module.write_bytes(source)
            os.utime(module, ns=(times.st_atime_ns, times.st_mtime_ns))  # compiled already

    def _run(self, tests: list[str]) -> str:
        (self._tree / "chosen").write_text(json.dumps(tests))
        child = os.fork()
        if not child:
            try:
                os._exit(self._be_pytest(tests))
            finally:
                os._exit(os.EX_SOFTWARE)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return f"left: {len(tests)} tests notice nothing"
        said = (self._tree / "said").read_text(errors="replace").splitlines()
        failed = [line for line in said if line.startswith(("FAILED", "ERROR"))]
        return f"killed: {failed[0].split(' - ')[0] if failed else f'status {status}'}"

    def _be_pytest(self, tests: list[str]) -> int:
        limit_s = int(_SPARE_S + _SPARE * sum(self._record.seconds[test] for test in tests))
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
        os.setsid()  # whatever a mistake signals
        os.chdir(self._tree)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for fd, target in ((os.open(os.devnull, os.O_RDONLY), 0), (said, 1), (said, 2)):
            os.dup2(fd, target)
        for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
            del sys.modules[name]
        sys.path[:] = [str(self._tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
        sys.dont_write_bytecode = True  # of what is a mistake
        os.environ["MUTANTS_TESTS"] = "chosen"
        files = sorted({test.partition("::")[0] for test in tests})
        return int(pytest.main([*_OPTIONS, "-x", f"--timeout={_HANGS_S}", *files]))


# --- the end ----------------------------------------------------------------------------------


def _report(ends: dict[Mutant, str], reasons: dict[str, str]) -> int:
    left = [mutant for mutant, end in ends.items() if end.startswith("left")]
    killed = 1 - len(left) / len(ends) if ends else 1.0
    unexplained = sorted(mutant.name for mutant in left if mutant.name not in reasons)
    needless = sorted(m.name for m in ends if m.name in reasons and m not in left)
    modules = Counter(mutant.file for mutant in left)
    _say(f"\n{killed:.1%} of {len(ends)} mutants are killed; {WANTED:.0%} have to be.")
    for file, number in modules.most_common():
        _say(f"  {number} left in {file}")
    for title, names in (("Left without a reason", unexplained), ("Killed after all", needless)):
        if names:
            _say("\n".join([f"\n{title}:", *(f"  {name}" for name in names)]))
    return 0 if killed >= WANTED and not unexplained and not needless else 1


def _say(text: str) -> None:
    with suppress(BrokenPipeError):
        print(text, flush=True)  # noqa: T201 -- a command


if __name__ == "__main__":
    sys.exit(main())
