"""What no single module can promise: imports point down, and the documents keep their word."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from etcdfs.errors import CallerError, CommandError, EtcdfsError, SnapshotError, StoreError
from etcdfs.options import OPTIONS, MountOptions
from tests.support.manual_pages import MANUAL, pages
from tests.support.reference_page import reference

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SEMANTICS = (ROOT / "docs/semantics.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()


def section(title: str) -> str:
    """Return what the semantics say below one heading, up to the next heading of any level."""
    found = re.search(rf"^#+ {title}\n(.*?)(?=^#|\Z)", SEMANTICS, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/semantics.md has no section {title!r}"
    return found[1]


def below(parent: type[EtcdfsError]) -> Iterator[type[EtcdfsError]]:
    """Yield all subclasses, of any depth."""
    for child in parent.__subclasses__():
        yield child
        yield from below(child)


# --- imports --------------------------------------------------------------------------------


def test_import_contracts_are_kept() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_are_changed_through_one_door() -> None:
    """Whoever is not the tree's own package changes it through `Update`."""
    outside = [p for p in (ROOT / "etcdfs").rglob("*.py") if p.parent.name != "tree"]
    found = {p.name: re.findall(r"tree\.(?:attach|detach)\(", p.read_text()) for p in outside}
    assert {name for name, calls in found.items() if calls} == set()


# --- errors ---------------------------------------------------------------------------------


def test_every_error_is_somebodys_fault() -> None:
    families = (CallerError, StoreError, SnapshotError, CommandError)
    assert [e for e in below(EtcdfsError) if not issubclass(e, families)] == []


def test_exit_codes_differ() -> None:
    codes = [error.exit_code for error in below(CommandError) if issubclass(error, CommandError)]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("field", [field.name for field in fields(MountOptions)])
def test_every_option_is_read(field: str) -> None:
    modules = [path for path in (ROOT / "etcdfs").rglob("*.py") if path.name != "options.py"]
    assert any(f".{field}" in path.read_text() for path in modules), "nobody reads it"


def test_the_reference_is_what_the_tables_say() -> None:
    assert (ROOT / "docs/reference.md").read_text() == reference(), "run `make reference`"


def test_the_manual_pages_are_what_the_tables_say() -> None:
    found = {path.relative_to(MANUAL): path.read_text() for path in MANUAL.rglob("*.[18]")}
    assert found == pages(), "run `make reference`"
    mount = found[Path("man1/etcdfs-mount.1")].replace("\\-", "-")
    assert [
        name for name, row in OPTIONS.items() if not row.is_secret and f"--{name}\\fR" not in mount
    ] == []


@pytest.mark.programs("mandoc")
def test_the_manual_pages_are_well_formed() -> None:
    done = subprocess.run(
        ["mandoc", "-Tlint", "-Wwarning", *MANUAL.rglob("*.[18]")],
        capture_output=True,
        check=False,
        text=True,
        timeout=50,
    )
    # Without one, the same source always makes the same page.
    assert [line for line in done.stdout.splitlines() if "missing date" not in line] == []


# --- statements -----------------------------------------------------------------------------


def test_every_statement_has_a_test_and_every_such_test_a_statement() -> None:
    stated = [int(number) for number in re.findall(r"\*\*B(\d+)\b", section("Behaviour"))]
    assert stated == list(range(1, len(stated) + 1)), "statements are numbered without gaps"
    tested = {
        int(number)
        for path in (ROOT / "tests").rglob("test_*.py")
        for number in re.findall(
            r"^\s*(?:async )?def test\w*?_b(\d+)_", path.read_text(), re.MULTILINE
        )
    }
    assert tested == set(stated)


def named_in(title: str) -> list[str]:
    return re.findall(r"`(test_\w+)`", section(title))


@pytest.mark.parametrize("title", ["Calls", "Differences from POSIX"])
def test_every_line_of_the_tables_names_tests_that_are_there(title: str) -> None:
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert [name for name in named_in(title) if name not in there] == []
    lines = [
        line for line in section(title).splitlines() if re.match(r"- |\| [a-z]|\| [A-Z]_", line)
    ]
    assert len(lines) >= 10
    assert [line for line in lines if "`test_" not in line] == []


# --- dependencies ---------------------------------------------------------------------------


def test_what_is_depended_upon_is_pinned_within_its_bounds() -> None:
    """`make` installs from constraints.txt: each direct dependency is in it, at a version allowed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    texts = [
        *project["project"]["dependencies"],
        *(text for extra in project["project"]["optional-dependencies"].values() for text in extra),
        *(text for group in groups.values() for text in group if isinstance(text, str)),
    ]
    pinned = {
        canonicalize_name(name): version
        for name, version in re.findall(
            r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
        )
    }
    wanted = [Requirement(text) for text in texts]
    assert [
        str(one)
        for one in wanted
        if not one.specifier.contains(pinned.get(canonicalize_name(one.name), "0"))
    ] == []


# --- documents ------------------------------------------------------------------------------


def test_the_readme_is_a_front_door() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
)
def test_links_between_documents_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_layers_are_drawn_as_they_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = [c for c in project["tool"]["importlinter"]["contracts"] if c["id"] == "layers"]
    layers = [line.replace(" :", ",") for line in contract["layers"]]
    assert "```text\n" + "\n".join(layers) + "\n```" in ARCHITECTURE


def test_the_events_of_the_log_are_in_their_table() -> None:
    modules = (path.read_text() for path in (ROOT / "etcdfs").rglob("*.py"))
    logged = {event for text in modules for event in re.findall(r'"event": "(\w+)"', text)}
    text = (ROOT / "docs/operations.md").read_text().partition("## The log")[2]
    rows = re.findall(r"^\| (`.+?`) \|", text.partition("\n## ")[0], re.MULTILINE)
    assert {event for row in rows for event in re.findall(r"`(\w+)`", row)} == logged


def test_the_table_of_what_to_open_names_what_is_there() -> None:
    table = re.search(
        r"^## To change something.*?\n(.*?)^## ", ARCHITECTURE, re.MULTILINE | re.DOTALL
    )
    assert table is not None
    paths = re.findall(r"`(etcdfs/[\w/.]+|tests/[\w/.]+)`", table[1])
    assert len(paths) >= 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


# --- sizes ----------------------------------------------------------------------------------

_LINES_MAX = 600
_LINES_MAX_OF = {"filesystem.py": 700}
_MODULES_MAX = 8
_PACKAGES = sorted(path.parent for path in (ROOT / "etcdfs").glob("*/__init__.py"))


@pytest.mark.parametrize("path", sorted((ROOT / "etcdfs").rglob("*.py")), ids=lambda p: p.name)
def test_modules_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= _LINES_MAX_OF.get(path.name, _LINES_MAX)


@pytest.mark.parametrize("package", _PACKAGES, ids=lambda p: p.name)
def test_packages_stay_small(package: Path) -> None:
    modules = {path.stem for path in package.iterdir() if path.suffix in {".py", ".c"}}
    assert len(modules - {"__init__"}) <= _MODULES_MAX
    assert (package / "__init__.py").read_text().count('"""') == 2, "each says what it knows"
