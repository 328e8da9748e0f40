"""How commands end, in processes of their own: exit codes, interruptions, readers that leave, errors with and without a traceback."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import typer

from secateur import cli
from secateur.cli_help import COMMANDS
from secateur.endings import CODES, ending
from secateur.errors import DataError, InputError

ROOT = Path(__file__).parent.parent
SECATEUR = [sys.executable, "-m", "secateur"]
BEGIN = [sys.executable, "-c", "import sys, secateur_start; sys.exit(secateur_start.main())"]  # what the command `secateur` is
SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
NET = """
import sys, time, torch

def stay():
    print("now", file=sys.stderr, flush=True)
    time.sleep(60)

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), torch.randn(2, 4)

def loading():
    stay()

def writing():
    from secateur.models import atomic
    atomic.sync = lambda path: stay()
    return net()

def reporting():
    from secateur.report import files
    files.sync = lambda path: stay()
    return net()

def broken():
    from secateur import job
    job.check = lambda *args: {}["axis"]
    return net()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my.py").write_text(NET)
    return tmp_path


def run(*arguments, command=SECATEUR, cwd=None, **more):
    surroundings = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **more}
    return subprocess.run([*command, *arguments], cwd=cwd, env=surroundings, capture_output=True, text=True, timeout=300)


def tree(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# ---------------------------------------------------------------- stopped
def heard():
    """In a new process: SIGINT is no longer passed over, as it is below a shell that put the tests into the background, nor SIGHUP below nohup."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def stopped(folder, factory, number, *arguments):
    """Run `prune` until the factory says "now", send the signal twice, and return the exit code and what stood on standard error."""
    command = [*SECATEUR, "prune", f"my.py:{factory}", "--at-most", "macs=60%", *arguments]
    surroundings = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=surroundings, preexec_fn=heard, **pipes) as process:
        for line in process.stderr:
            if line == "now\n":
                break
        process.send_signal(number)
        time.sleep(0.05)
        process.send_signal(number)  # impatience changes nothing
        said = process.stderr.read()
        return process.wait(60), said, process.stdout.read()


@pytest.mark.parametrize("factory, number", [
    ("loading", signal.SIGINT), ("writing", signal.SIGTERM), ("writing", signal.SIGHUP), ("reporting", signal.SIGINT),
])  # fmt: skip
def test_a_signal_leaves_no_half_files(factory, number, folder):
    before = tree(folder)
    code, said, out = stopped(folder, factory, number, "-o", "out")
    assert (code, said) == (128 + number, f"secateur: {SAID[number]}\n")
    assert out == ""
    after = tree(folder)
    if factory == "reporting":  # the model was whole by then
        assert cli.main(["verify", str(folder / "out")]) == 0
        after = {name: text for name, text in after.items() if not name.startswith("out/")}
    assert after == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_signal_while_writing_leaves_the_folder_before(folder):
    assert cli.main(["prune", f"{folder / 'my.py'}:net", "--at-most", "macs=80%", "-o", str(folder / "out")]) == 0
    before = tree(folder)
    code, said, _ = stopped(folder, "writing", signal.SIGINT, "-o", "out")
    assert (code, said) == (130, "secateur: interrupted\n")
    assert tree(folder) == before


@pytest.mark.parametrize("number", list(SAID))
def test_it_can_be_stopped_while_torch_is_imported(number, folder):
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("import sys, time\nprint('now', file=sys.stderr, flush=True)\ntime.sleep(60)\n")
    surroundings = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen([*BEGIN, "demo"], env=surroundings, preexec_fn=heard, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == "now\n"
        process.send_signal(number)
        assert process.stderr.read() == f"secateur: {SAID[number]}\n"
        assert process.wait(60) == 128 + number


def test_a_second_signal_later_is_heard(monkeypatch):
    """Only impatience within a second is passed over: work that swallows the first one can still be stopped."""
    from secateur import endings

    monkeypatch.setattr(endings, "_AGAIN", 0.0)
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    caught = []

    def stubborn():
        for _ in range(2):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            except KeyboardInterrupt:
                caught.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert ending(stubborn) == 130 and caught == [1, 1]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers, "handlers are put back"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert ending(lambda: os.kill(os.getpid(), signal.SIGINT)) == 0, "what a shell made ignored stays so, as below nohup"
    signal.signal(signal.SIGINT, outside)


def test_it_runs_in_a_thread_too(capsys):
    found = []
    thread = threading.Thread(target=lambda: found.append(cli.main(["--version"])))
    thread.start()
    thread.join()
    assert found == [0] and capsys.readouterr().out.startswith("secateur ")


# ---------------------------------------------------------------- a reader that leaves
def test_a_reader_that_leaves_is_no_error():
    with subprocess.Popen([*SECATEUR, "explain"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


def test_a_refusal_is_not_taken_for_a_reader_that_left(capsys):
    assert cli.main(["verify", "nowhere"]) == 1 and "nowhere" in capsys.readouterr().err


# ---------------------------------------------------------------- errors
def test_a_defect_is_called_one_and_shows_its_traceback_when_asked(folder, monkeypatch, capsys):
    arguments = ("prune", "my.py:broken", "--at-most", "macs=60%", "-o", "out")
    shown = run("--debug", *arguments, cwd=folder)
    assert shown.returncode == 3 and "Traceback (most recent call last)" in shown.stderr and shown.stdout == ""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("secateur.job.check", None)  # put back afterwards what the factory breaks
    assert cli.main(list(arguments)) == 3
    done = capsys.readouterr()
    assert done.out == "" and done.err.splitlines()[0] == "secateur: KeyError: 'axis'"
    assert "a defect of secateur" in done.err and "--debug to see the traceback" in done.err and "Traceback" not in done.err
    assert shown.stderr.endswith(done.err)
    assert sorted(tree(folder)) == ["my.py"]


def test_exit_codes():
    def raising(error):
        def work():
            raise error

        return work

    codes = [(lambda: None, 0), (raising(DataError("x")), 1), (raising(InputError("x")), 2), (raising(ValueError("x")), 3),
             (raising(MemoryError()), 1), (raising(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")), 1),
             (raising(KeyboardInterrupt()), 130), (raising(BrokenPipeError()), 141),
             (raising(SystemExit(2)), 2), (raising(SystemExit(None)), 0)]  # fmt: skip
    for work, code in codes:
        assert ending(work) == code
    documented = set(map(int, re.findall(r"\b(\d+) ", CODES)))
    assert documented == {code for _, code in codes} | {129, 143}


def test_memory_that_runs_out_is_no_defect(capsys):
    def work():
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore")

    ending(work)
    assert "not enough memory" in capsys.readouterr().err


def test_signs_that_the_output_cannot_write_are_replaced(monkeypatch):
    held = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding="ascii"))
    assert ending(lambda: print("3 µJ ± 1")) == 0
    assert held.getvalue() == b"3 ?J ? 1\n"


# ---------------------------------------------------------------- help, version, completion
def test_the_version():
    done = run("--version", command=BEGIN)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"secateur {cli.__version__}\n", "")


def commands():
    return {command.name or command.callback.__name__: command for command in cli.app.registered_commands}


def test_every_command_has_its_line_and_an_example_that_can_be_meant(monkeypatch):
    """The example is parsed by the command it stands for: its options exist and its arguments are enough."""
    monkeypatch.setenv("COLUMNS", "80")
    assert set(COMMANDS) == set(commands())
    built = typer.main.get_command(cli.app)
    for name, (line, example) in COMMANDS.items():
        first, *rest = example.split()
        assert first == name
        built.commands[name].make_context(name, rest)
        assert len(line) <= 60 and line.endswith("."), f"{name}: its line is cut short in 80 columns"
        assert len(f"  Example: secateur {example}") <= 78, f"{name}: its example is broken in two"


def test_help_says_the_exit_codes_and_shows_examples(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert " ".join(CODES.split()) in " ".join(said.split())
    assert "..." not in said.split("Commands:")[1].split("Exit codes")[0]
    for name, (line, example) in COMMANDS.items():
        assert line in said
        assert cli.main([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert f"Example: secateur {example}\n" in shown and "--debug" in shown
        assert max(map(len, shown.splitlines())) <= 80


def test_completion_knows_the_commands(tmp_path, monkeypatch, capsys):
    done = run(command=BEGIN, _SECATEUR_COMPLETE="complete_bash", COMP_WORDS="secateur m", COMP_CWORD="1")
    assert done.stdout.split() == ["measure", "mask"]
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # the tests may not run below a shell
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["--show-completion", "bash"]) == 0
    assert "_SECATEUR_COMPLETE=complete_bash" in capsys.readouterr().out
    assert cli.main(["--install-completion", "bash"]) == 0
    (script,) = [path for path in tmp_path.rglob("*.sh")]
    assert "_SECATEUR_COMPLETE=complete_bash" in script.read_text() and str(script) in (tmp_path / ".bashrc").read_text()


# ---------------------------------------------------------------- on a terminal
def on_terminal(*arguments, **more):
    """What a command writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    surroundings = {**os.environ, "COLUMNS": "80", "TERM": "xterm-256color", "PYTHONDONTWRITEBYTECODE": "1", **more}
    surroundings.pop("FORCE_COLOR", None)
    with subprocess.Popen([*SECATEUR, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=surroundings) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            said += part
        assert process.wait(60) == 0, said
    os.close(ours)
    return said.decode()


def test_eighty_columns_without_colour_and_a_pipe(capsys):
    shown = on_terminal("explain", NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|4[0-7]|9[0-7]|38;|48;)[0-9;]*m", shown), "no colours"
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in shown
    assert cli.main(["explain"]) == 0
    piped = capsys.readouterr()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", piped.out) and piped.err == ""
    assert max(map(len, piped.out.splitlines())) > 120, "lines of a file are as long as they are"
