"""The pages of the documentation that are written from the code and the results, and what mkdocs has to know of them.

mkdocs loads this file as a hook (mkdocs.yml) and asks it for the pages as it builds the site; none of them is committed:

    criteria.md              a card for every criterion and method, as `secateur explain NAME` prints it
    cli.md                   every command with its arguments and options, as `--help` prints them
    benchmarks/index.md      the rows of the README's table, from benchmarks/results/*.json
    benchmarks/*.md          the long tables that the benchmarks write themselves
    how-to/recipes.md        the files of examples/, as they are
    decisions/index.md       the decisions by number and title

`pages()` is the same without mkdocs, for the tests.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from scripts import readme_table  # noqa: E402  the path has to be set first

DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
LONG = {  # tables of benchmarks/results that are pages of their own
    "no_training.md": "Structures without training",
    "masks.md": "Single weights without training",
    "zoo.md": "Coverage, model by model",
}
NEEDS = {"weights": "the weights only", "inputs": "batches of inputs (`data=`)", "labels": "batches with labels (`data=`), or `loss=`"}


def pages() -> dict[str, str]:
    """Name below docs/ -> Markdown, of every page that is generated."""
    return {
        "criteria.md": criteria(), "cli.md": commands(), "benchmarks/index.md": benchmarks(), "decisions/index.md": decisions(),
        "how-to/recipes.md": recipes(),
        **{f"benchmarks/{name}": _long(RESULTS / name, title) for name, title in LONG.items() if (RESULTS / name).exists()},
    }  # fmt: skip


# ---------------------------------------------------------------- cards
def criteria() -> str:
    """A card for every entry of `score.CRITERIA` and of `masks.METHODS`."""
    from secateur.masks import METHODS
    from secateur.score import CRITERIA

    text = ["# Criteria and methods", "What `secateur explain` prints. What scores lowest goes first."]
    text += ["## Units: `--score`, `score=`", *map(_card, CRITERIA.values())]
    text += ["## Single weights: `--by`, `by=`", *(_card(method, "mask-") for method in METHODS.values())]
    return "\n\n".join(text) + "\n"


def _card(each: Any, prefix: str = "") -> str:
    facts = each.facts()
    formula = "\n>\n".join(f"> `{part.strip()}`" for part in facts["formula"].split(";  "))
    said = re.split(r"\n\s*(?:Args|Returns|Raises)\b", inspect.getdoc(each.function) or "")[0]
    lines = [f"### {facts['name']} {{ #{prefix}{facts['name']} }}", facts["when"], formula, *([_prose(said)] if said else [])]
    lines += [f"| needs | costs |\n| --- | --- |\n| {NEEDS[facts['needs']]} | {_cell(facts['cost'])} |", f"*{facts['paper']}*"]
    return "\n\n".join(lines)


# ---------------------------------------------------------------- commands
def commands() -> str:
    """Every command of the command line, from the parameters that `--help` prints."""
    import typer

    from secateur.cli import app

    group = typer.main.get_command(app)
    head = ["# Command line", _prose(group.help or ""), "What `secateur COMMAND --help` prints. [Exit codes](exit-codes.md) have a page."]
    return "\n\n".join(head + [_command(name, command) for name, command in group.commands.items()]) + "\n"  # type: ignore[attr-defined]


def _command(name: str, command: Any) -> str:
    context = command.context_class(command, info_name=f"secateur {name}")
    shown = [record for p in command.params if (record := p.get_help_record(context))]
    text = [f"## {name}", _prose(command.help or "")]
    text += [f"`{_cell(command.get_usage(context).removeprefix('Usage: '))}`"]
    for example in re.findall(r"secateur .*", command.epilog or ""):
        text += [f"```sh\n{example}\n```"]
    rows = [f"| {_words(left)} | {_cell(said)} |" for left, said in shown if left != "--help"]
    return "\n\n".join([*text, '<div class="options" markdown>', "\n".join(["| option | what |", "| --- | --- |", *rows]), "</div>"])


def _words(option: str) -> str:
    """`-o`, `--out` `FOLDER`: each word by itself, so that a narrow column breaks between them."""
    return re.sub(r"<[^>]*>|[^\s,/<]+", lambda found: f"`{found[0]}`", _cell(option))


def _prose(text: str) -> str:
    """Help as Markdown: paragraphs stay, lines that stand in by two blanks or more are code."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(text.replace("\b\n", "")))
    coded = [f"```text\n{inspect.cleandoc(block)}\n```" if block.startswith("  ") else block for block in blocks]
    return "\n\n".join(coded)


def _cell(text: str) -> str:
    """Text inside a table: one line, and no bar that ends the cell."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


# ---------------------------------------------------------------- results
def _long(path: Path, title: str) -> str:
    text = path.read_text()
    return f"# {title}\n\n{text.split(chr(10), 1)[1] if text.startswith('# ') else text}"


def benchmarks() -> str:
    """The rows of the README's table, each with the command that measured it."""
    text = ["# Benchmarks", (
        "Every figure here comes from a file in `benchmarks/results`, written by the command named with it. They were measured on "
        "ordinary CPUs, mostly one or two threads; the files say on which, with which versions. Test sets were read at the end only, "
        "except where a [decision](../decisions/index.md) says otherwise."
    )]  # fmt: skip
    for (command, source), rows in readme_table.by_source(RESULTS).items():
        text += [f"## {what[0].upper()}{what[1:]}\n\n{_listed(figures)}" for what, figures in rows]
        text += [f"From `{source}`, written by `{command}`."]
    text += ["## The long tables", "\n".join(f"- [{title}]({name})" for name, title in LONG.items())]
    return "\n\n".join(text) + "\n"


def _listed(figures: str) -> str:
    """Figures one below the other: cut at semicolons, and at commas behind a figure and before the next share."""
    parts = re.split(r"; (?![^(]*\))|(?<=[)*]), (?=[÷−\d])", figures)
    return "\n".join(f"- {part.strip()}" for part in parts)


# ---------------------------------------------------------------- recipes
def recipes() -> str:
    """Every file of examples/ under what its docstring says of it."""
    text = ["# Recipes", "What is pruned most, each a file of `examples/` that runs as it stands and that the tests run."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        said, code = path.read_text().removeprefix('"""').split('"""', 1)
        text += [f"## {path.name}", said.strip(), f"```python\n{code.strip()}\n```"]
    return "\n\n".join(text) + "\n"


# ---------------------------------------------------------------- decisions
def decisions() -> str:
    """The decisions, newest last."""
    rows = [f"- [{title}]({path.name})" for path, title in _decided()]
    return "\n\n".join(["# Decisions", "What was decided, what made it necessary, and what it costs.", "\n".join(rows)]) + "\n"


def _decided() -> Iterator[tuple[Path, str]]:
    for path in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        if not path.name.startswith("0000"):  # the template
            yield path, path.read_text().split("\n", 1)[0].removeprefix("# ")


# ---------------------------------------------------------------- what mkdocs calls
def on_config(config: Any) -> Any:
    """Put the decisions that are there into the navigation."""
    background = next(entry["Background"] for entry in config["nav"] if "Background" in entry)
    place = next(entry for entry in background if "Decisions" in entry)
    place["Decisions"] = ["decisions/index.md", *(f"decisions/{path.name}" for path, _ in _decided())]
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Drawings stand in the page itself, so that they take its colours, light or dark."""

    def drawn(found: re.Match[str]) -> str:
        picture = (DOCS / page.file.src_uri).parent / found[2]
        return f'<figure class="drawing" data-search-exclude role="img" aria-label="{found[1]}">\n{picture.read_text().strip()}\n</figure>'

    return re.sub(r"^!\[([^\]]*)\]\((\S+\.svg)\)$", drawn, markdown, flags=re.MULTILINE)
