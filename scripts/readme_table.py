"""Write the results table of README.md from benchmarks/results/*.json, or check that it is what they say.

A results file that wants rows in the README has a key "readme":

    "readme": {"order": 10, "command": "make zoo", "rows": [["what was measured", "the figure, with its unit"], ...]}

Run as `python scripts/readme_table.py` to write, with `--check` to fail if writing would change anything.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results -->", "<!-- /results -->"


def table(folder: Path) -> str:
    """The Markdown table of every results file in the folder, in their order."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        readme = data.get("readme") if isinstance(data, dict) else None
        if readme:
            parts.append((readme.get("order", 100), path.name, readme))
    lines = ["| what | result | from |", "| --- | --- | --- |"]
    for _, name, readme in sorted(parts, key=lambda part: part[:2]):
        source = f"[`{readme['command']}`](benchmarks/results/{name})"
        lines += [f"| {what} | {figure} | {source} |" for what, figure in readme["rows"]]
    return "\n".join(lines) if parts else "No results have been committed yet."


def written(readme: str, rows: str) -> str:
    """The README with the text between the two markers replaced."""
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{rows}\n{END}{rest.split(END)[1]}"


def main() -> int:
    path = ROOT / "README.md"
    old = path.read_text()
    new = written(old, table(ROOT / "benchmarks" / "results"))
    if "--check" in sys.argv:
        return int(old != new)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
