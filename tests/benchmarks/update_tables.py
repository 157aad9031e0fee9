"""Write all tables of results from the raw numbers, into the README next to the numbers.

A table is known by its first row and by the study that its section is about. A new section needs
its heading, `## NAME`, and the first row of each of its tables. A new column of the table of all
claims needs its name in the first row.

    python tests/benchmarks/update_tables.py
"""

from __future__ import annotations

import re
from pathlib import Path

from atod_train.reports.results import Results, read_results
from atod_train.reports.tables import (
    Table,
    claims_table,
    difference_table,
    first_pairs,
    main_table,
    phase_table,
)

RESULTS = Path(__file__).resolve().parent / "results"


def made_again(
    first_row: str, found: dict[str, Results], section: str, split: str | None
) -> Table | None:
    """Return the table that begins with a row, or None if it is no table of results."""
    columns = [cell.strip() for cell in first_row.strip("|\n ").split("|")]
    if columns[0] == "claim" and all(name in found for name in columns[1:]):
        return claims_table([found[name] for name in columns[1:]])
    environment = found.get(section)
    if environment is None:
        return None
    if columns[:2] == ["model", "seeds"]:
        return main_table(environment, split)
    if columns[:2] == ["claim", "common seeds"]:
        return difference_table(environment, first_pairs(environment))
    if columns[:2] == ["model", "minutes"]:
        return phase_table(environment)
    return None


def rewritten(text: str, found: dict[str, Results]) -> str:
    """Return a text with all its tables of results updated."""
    section, split = "", None
    parts = []
    for part in re.split(r"(^#.*\n|^`\w+`:\n|(?:^\|.*\n)+)", text, flags=re.MULTILINE):
        if part.startswith("#"):
            section, split = part.strip("# \n"), None
        elif part.startswith("`"):
            split = part.strip("`:\n")
        elif part.startswith("|"):
            table = made_again(part.partition("\n")[0], found, section, split)
            parts.append(table.markdown if table else part)
            split = None
            continue
        parts.append(part)
    return "".join(parts)


def main() -> None:
    found = {made.name: made for made in read_results(sorted(RESULTS.glob("*.json")))}
    path = RESULTS / "README.md"
    path.write_text(rewritten(path.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
