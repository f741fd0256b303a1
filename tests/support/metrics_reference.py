"""docs/metrics.md: its table is made of the rows of `etcdfs.daemon.metrics.TABLE`.

`make reference` writes it anew.
"""

from pathlib import Path

from etcdfs.daemon.metrics import EACH, PREFIX, TABLE, Kind, Metric

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
_HEADING = "| status | metric | meaning |\n| --- | --- | --- |\n"


def table() -> str:
    """Return the table, in the order of the rows."""
    return _HEADING + "".join(f"{_line(row)}\n" for row in TABLE)


def _line(row: Metric) -> str:
    return f"| `{row.source.replace(EACH, 'NAME')}` | {_metric(row)} | {row.help} |"


def _metric(row: Metric) -> str:
    match row.kind:
        case Kind.UNSHOWN:
            return ""
        case Kind.INFO:
            return f'`{PREFIX}mount_info{{{row.name}="..."}}`'
        case _:
            labels = [f'{name}="{value}"' for name, value in row.labels.items()]
            labels += [f'{row.each}="..."'] if row.each else []
            return f"`{PREFIX}{row.name}{'{' + ','.join(labels) + '}' if labels else ''}`"


def with_table(page: str) -> str:
    """Return a page with the table in the place of the one that it has."""
    before, _, after = page.partition(_HEADING)
    lines = after.splitlines(keepends=True)
    rest = next((at for at, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return before + table() + "".join(lines[rest:])


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
