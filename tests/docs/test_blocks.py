"""What the pages show is run: Python blocks in order, in one namespace a page; commands in the folder that the blocks made."""

import shlex
import shutil
import sys
from importlib.util import find_spec

import pytest

from scripts import docs_pages
from secateur import cli
from tests.docs.written import PAGES, ROOT, blocks, blocks_of

RUN = [path for path in PAGES if blocks(path)]
GENERATED = [block for name, text in docs_pages.pages().items() for block in blocks_of(name, text)]
COMMITTED = [block for path in [*PAGES, ROOT / "README.md"] for block in blocks(path)]
PARSED = [block for block in [*COMMITTED, *GENERATED] if block.commands()]


def missing(said):
    """Why a block is not run here, '' where it is: its page says so, or something that it needs is not installed."""
    what, _, rest = said.partition(":")
    if what == "not run":
        assert rest.strip(), "say why"
        return rest
    if what != "needs":
        return ""
    return ", ".join(name for name in map(str.strip, rest.split(",")) if not (shutil.which("g++") if name == "compiler" else find_spec(name)))


def run(path, folder, monkeypatch, capsys):
    """Run the blocks of a page in `folder`. A block with a title is written to the file of that name first."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "net", raising=False)  # that of another page's folder
    namespace = {"__name__": "__main__"}
    for block in blocks(path):
        if missing(block.said):
            continue
        if block.language == "python":
            if block.title:
                (folder / block.title).write_text(block.text)
            exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), namespace)
        elif block.language == "sh":
            for command in block.commands():
                code = cli.main(command)
                said = capsys.readouterr()
                assert code == 0, f"{block.page}:{block.line}: secateur {' '.join(command)}\n{said.err}"


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The folder in which the quickstart's blocks have made net.py and net.safetensors."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.delitem(sys.modules, "net", raising=False)
        for block in blocks(next(path for path in PAGES if path.name == "quickstart.md")):
            if block.title:
                (folder / block.title).write_text(block.text)
                exec(compile(block.text, block.title, "exec"), {"__name__": "__main__"})
    return folder


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_blocks_run(path, started, tmp_path, monkeypatch, capsys):
    for name in ("net.py", "net.safetensors"):
        shutil.copy(started / name, tmp_path)
    run(path, tmp_path, monkeypatch, capsys)
    assert (tmp_path / "net.py").exists()


def commands():
    """Name -> command of the command line."""
    import typer

    return typer.main.get_command(cli.app).commands


SHOWN = [block for path in PAGES for block in blocks(path) if block.language == "console"]


@pytest.mark.parametrize("block", SHOWN, ids=lambda block: f"{block.page}:{block.line}")
def test_refusals_are_shown_as_they_are(block, tmp_path, monkeypatch, capsys):
    """`$ secateur ...`, and below it what it says on standard error."""
    monkeypatch.chdir(tmp_path)
    command, _, expected = block.text.partition("\n")
    assert cli.main(shlex.split(command)[2:]) != 0
    said = capsys.readouterr().err
    assert said.split() == expected.split()  # the terminal wraps lines


@pytest.mark.parametrize("block", PARSED, ids=lambda block: f"{block.page}:{block.line}")
def test_commands_parse(block):
    known = commands()
    for name, *words in block.commands():
        assert name in known, f"secateur {name} is no command"
        given = known[name].make_context(name, words)
        assert given.params
