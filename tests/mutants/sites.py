"""Where a module can be changed so that some test should notice.

Knows: Python's syntax. Does not know: tests.

Five kinds of change, each to one place: a comparison is turned round, a boolean negated, `and` and
`or` swapped, a call whose result nobody uses removed, a number or bytes constant changed. Left
alone is what no test should have to pin down: assertions and `# INVARIANT` checks (`assert`), what
is logged, `__repr__`, annotations, and texts.
"""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

_TURNED: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_CONNECTIVES: Final = (ast.Compare, ast.BoolOp)
"""Whose own change is as good as the negation of the whole."""


@final
@dataclass(frozen=True, order=True)
class Mutant:
    """One change of one place.

    Attributes:
        name: What it is called in every run, whatever else changes in its module.
        file: The module, relative to the root of the tree.
        begin: Where the changed text begins, in bytes of the source.
        end: Where it ends.
        text: What stands there instead.
        lines: The first and the last line of the statement, or of the head of a compound one.
    """

    name: str
    file: Path
    begin: int
    end: int
    text: str
    lines: tuple[int, int]

    def apply(self, source: bytes) -> bytes:
        """Return the source of the module, changed."""
        return source[: self.begin] + self.text.encode() + source[self.end :]

    def rank(self, seed: int) -> bytes:
        """Return where a seed puts it among others: a change elsewhere moves no other mutant."""
        _module, _, rest = self.name.partition(":")
        return hashlib.sha256(b"%d %s" % (seed, rest.encode())).digest()


def find_mutants(root: Path, file: Path) -> list[Mutant]:
    """Return all mutants of a module, in the order of its text.

    Args:
        root: The root of the tree.
        file: The module, relative to it.
    """
    source = (root / file).read_bytes()
    finder = _Finder(source, file)
    finder.visit(ast.parse(source))
    return finder.found


class _Finder(ast.NodeVisitor):
    def __init__(self, source: bytes, file: Path) -> None:
        self._source = source
        self._file = file
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._scope: list[str] = []
        self._lines = (1, 1)
        self.found: list[Mutant] = []

    # --- where we are -----------------------------------------------------------------------

    def visit(self, node: ast.AST) -> None:
        """Keep track of the statement, and leave out what is to be left alone."""
        if isinstance(node, ast.stmt):
            if _is_left_alone(node):
                return
            self._lines = _head(node)
        super().visit(node)

    def _enter(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self._scope.append(node.name)
        for child in node.body:
            self.visit(child)
        self._scope.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._enter(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._function(node)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(default)
        self._enter(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave texts alone."""

    # --- what can be changed ----------------------------------------------------------------

    def visit_Expr(self, node: ast.Expr) -> None:
        called = node.value.value if isinstance(node.value, ast.Await) else node.value
        if isinstance(called, ast.Call):
            self._add(node, "pass")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for place, operator in enumerate(node.ops):
            turned = [*node.ops[:place], _TURNED[type(operator)](), *node.ops[place + 1 :]]
            self._add(node, ast.Compare(node.left, turned, node.comparators))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self._add(node, ast.BoolOp(other, node.values))
        for value in node.values:
            self._negate(value)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._add(node, node.operand)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_match_case(self, node: ast.match_case) -> None:
        self._lines = (node.pattern.lineno, max(node.pattern.lineno, node.body[0].lineno - 1))
        if node.guard is not None:
            self._negate(node.guard)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._negate(test)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        match node.value:
            case bool() as value:
                self._add(node, ast.Constant(not value))
            case int() | float() as value:
                self._add(node, ast.Constant(value + 1))
            case bytes() as value:
                self._add(node, ast.Constant(value + b"?"))
            case _:  # texts are left alone
                pass

    def _negate(self, test: ast.expr) -> None:
        is_negation = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        if not is_negation and not isinstance(test, (*_CONNECTIVES, ast.Constant)):
            self._add(test, ast.UnaryOp(ast.Not(), test))

    def _add(self, node: ast.expr | ast.stmt, changed: ast.expr | str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        text = changed if isinstance(changed, str) else f"({ast.unparse(changed)})"
        begin = self._starts[node.lineno - 1] + node.col_offset
        end = self._starts[node.end_lineno - 1] + node.end_col_offset
        where = f"{'.'.join(self._file.with_suffix('').parts)}:{'.'.join(self._scope)}"
        name = f"{where} | {ast.unparse(node)} -> {text}"
        before = sum(other.name.split(" #")[0] == name for other in self.found)
        name += f" #{before + 1}" if before else ""
        self.found.append(Mutant(name, self._file, begin, end, text, self._lines))


def _is_left_alone(node: ast.stmt) -> bool:
    match node:
        case ast.Assert():
            return True
        case ast.Expr(ast.Constant()):  # a docstring
            return True
        case ast.Expr(ast.Call(ast.Attribute(ast.Name("log")))):
            return True
        case ast.FunctionDef(name="__repr__" | "check_invariants" | "__str__"):
            return True
        case ast.If(ast.Name("TYPE_CHECKING")):
            return True
        case _:
            return False


def _head(node: ast.stmt) -> tuple[int, int]:
    body = next(_bodies(node), None)
    assert node.end_lineno is not None
    last = node.end_lineno if body is None else max(node.lineno, body.lineno - 1)
    return node.lineno, last


def _bodies(node: ast.stmt) -> Iterator[ast.stmt]:
    match node:
        case ast.Match(cases=cases):
            yield cases[0].body[0]
        case _:
            yield from getattr(node, "body", [])
