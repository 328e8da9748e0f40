"""The same plan, statistics and weights from one process and from several; and what happens when one of them meets trouble."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from secateur.calibrate.moments import Moments, begun, shared
from secateur.errors import InputError
from secateur.processes import ALONE, Alone, Fingerprint, Processes, Shared, digest, of, share

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NETS = HERE.parent / "models" / "nets.py"
TIMEOUT = 300


class One(Alone):
    """One of `world` processes whose partners exchange nothing: enough to see which parts it takes."""

    def __init__(self, rank, world):
        self.rank, self.world = rank, world

    mine = Processes.mine


class Told(One):
    """A process that is told what another one, run before it, had to say."""

    def __init__(self, other=None):
        super().__init__(int(other is not None), 2)
        self.other, self.said = other, {}

    def lent(self, what, own):
        self.said[what] = own
        return self.other.said[what] if self.other else own

    def total(self, what, own):
        self.said[what] = dict(own)
        return {n: t + self.other.said[what][n] for n, t in own.items()} if self.other else dict(own)


def run(*line, processes=1):
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"] if processes > 1 else [sys.executable]
    return subprocess.run([*start, *map(str, line)], capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)


# ---------------------------------------------------------------- who runs what
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 11])
def test_every_part_is_run_once_and_the_work_is_even(world):
    owners = [[r for r in range(world) if One(r, world).mine(part)] for part in range(64)]
    assert all(len(found) == 1 for found in owners) and owners[0] == [0]
    held = [owners[part][0] for part in range(7, 64, 8)]  # by which fits are judged
    for parts in (owners, held):
        counts = [sum(found in ([r], r) for found in parts) for r in range(world)]
        assert max(counts) - min(counts) <= max(1, len(parts) // 8)


def test_what_is_shared_says_so_and_nothing_else():
    with pytest.raises(InputError, match="init_process_group"):
        Shared([torch.ones(1)])
    two = Shared([1, 2], One(1, 2))
    assert of(two) is two.processes and list(two) == [1, 2] and of([1]) is ALONE and of(None) is ALONE
    assert list(share([1, 2, 3], ALONE)) == [1, 2, 3] and list(share([1, 2, 3], One(1, 2))) == [2]


def test_a_fingerprint_sees_every_bit_and_the_order():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0000002])

    def printed(*items):
        found = Fingerprint()
        for item in items:
            found.add(item)
        return str(found)

    assert printed((a, b)) == printed((a.clone(), b.clone()))
    assert len({printed((a, b)), printed((b, a)), printed((a, a)), printed(a, b), printed((a,))}) == 5
    assert len({digest({"x": a}), digest({"x": b}), digest({"y": a}), digest({"x": a[None]}), digest({"x": a.double()})}) == 5


# ---------------------------------------------------------------- moments, bit by bit
def test_moments_are_the_same_to_the_bit_whoever_adds_up_which_chunks():
    """As weights are made from them by methods in which a last bit may decide on a mask."""
    g = torch.Generator().manual_seed(0)
    chunks = [(50 + torch.randn(2, 40, 5, generator=g), -20 + torch.randn(2, 40, 3, generator=g)) for _ in range(7)]

    def summed(processes):
        m, held = Moments(2, 5, 3), Moments(2, 5, 3)
        own = [c for c in range(7) if processes.mine(c)]
        begun("a layer", processes, chunks[0] if 0 in own else None, m, held)
        for c in own:
            (held if c == 3 else m).add(*chunks[c])
        shared("a layer", processes, m, held)
        return m, held

    first = Told()
    parts = summed(first), summed(Told(first)), summed(ALONE)
    assert parts[0][0].rows < parts[2][0].rows
    for two, one in zip(parts[1], parts[2], strict=True):
        assert two.rows == one.rows
        for got, wanted in zip((*two.central(), *two.mean()), (*one.central(), *one.mean()), strict=True):
            assert torch.equal(got, wanted)
    x = torch.cat([x for c, (x, _) in enumerate(chunks) if c != 3], 1).double()
    torch.testing.assert_close(parts[1][0].central()[0], torch.stack([v.mT.cov(correction=0) for v in x]), rtol=1e-5, atol=1e-6)


def test_a_process_without_chunks_brings_nothing_and_gets_everything():
    x = torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(0)) + 3
    full, none, first = Moments(1, 4, 0), Moments(1, 4, 0), Told()
    begun("a layer", first, (x, x[:, :, :0]), full)
    full.add(x, x[:, :, :0])
    shared("a layer", first, full)
    second = Told(first)
    begun("a layer", second, None, none)
    shared("a layer", second, none)
    assert none.rows == 30 and torch.equal(none.mean()[0], full.mean()[0]) and torch.equal(none.central()[0], full.central()[0])


# ---------------------------------------------------------------- real processes
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resnet", "transformer"])
def test_two_processes_find_what_one_finds(kind, tmp_path):
    found = []
    for processes in (1, 2):
        done = run(HERE / "worker.py", kind, tmp_path / f"{processes}.pt", processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(tmp_path / f"{processes}.pt", weights_only=True))
    one, two = found
    statistics = one.pop("statistics"), two.pop("statistics")
    assert statistics[0].keys() == statistics[1].keys() and len(statistics[0]) > 50
    for name, t in statistics[0].items():
        apart = float((statistics[1][name].double() - t.double()).norm())
        assert apart <= 1e-5 * float(t.double().norm()) + 1e-12, name
    for name, result in one.items():
        other = two[name]
        assert all(torch.equal(m, other["masks"][n]) for n, m in result["masks"].items()), name
        assert not all(bool(m.all()) for m in result["masks"].values())
        assert (other["fitted"], other["why"], other["rows"]) == (result["fitted"], result["why"], result["rows"])
        assert len(other["digests"]) == 2 and len(set(other["digests"])) == 1
        for n, t in result["state"].items():
            assert float((other["state"][n].double() - t.double()).norm()) <= 1e-5 * float(t.double().norm()) + 1e-9, (name, n)


@pytest.mark.slow
def test_trouble_in_one_process_is_an_error_in_words_in_all(tmp_path):
    line = [sys.executable, str(HERE / "troubles.py")]
    some = [subprocess.Popen([*line, str(r), "3", str(tmp_path / "meeting")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
            for r in range(3)]  # fmt: skip
    ended = [p.communicate(timeout=TIMEOUT) for p in some]
    assert all(p.returncode == 0 for p in some), [err[-2000:] for _, err in ended]
    came = [{n: v for text in out.splitlines() for n, v in json.loads(text).items()} for out, _ in ended]

    def said(trouble, *words):
        """What each process says; all of them stop with words of their own or of the one that failed."""
        for one, word in zip((c[trouble] for c in came), words, strict=True):
            assert word in one, (trouble, one)

    for trouble in ("a_loader_fails", "a_repair_meets_it"):
        said(trouble, "process 1 of 3 stopped: DataError: data stopped after 2", "DataError: data stopped after 2 batches", "process 1 of 3 stopped")
    said("another_order", *["ProcessError: the data of process 2 of 3 differs"] * 3)
    said("fewer_batches", *["ProcessError: the data of process 1 of 3 differs"] * 3)
    said("other_weights", *["ProcessError: the plan or the weights of process 1 of 3 differs"] * 3)
    said("another_way", *["process 0 of 3 is at 'sums of pears' and process 1 at 'sums of apples'"] * 3)
    said("a_callback_fails", "OSError: no space left", *["process 0 of 3 stopped: OSError: no space left"] * 2)
    said("read_once", *["InputError: data is a list_iterator"] * 3)
    said("one_chunk_without_a_derivative", *["RuntimeError: element 0 of tensors does not require grad"] * 3)
    for trouble in ("more_processes_than_batches", "all_refuse_alike", "latency"):
        assert came[0][trouble] == came[1][trouble] == came[2][trouble] and came[0][trouble]
    assert "lost its connection" in came[0]["gone"] and "lost its connection" in came[2]["gone"]


@pytest.mark.slow
def test_commands_under_torchrun(tmp_path):
    options = [f"{NETS}:net", "--data", f"{NETS}:rows", "--json"]
    for command in (["prune", *options, "--at-most", "macs=60%"], ["mask", *options, "--keep", "40%"]):
        one, two = (run("-m", "secateur", *command, "-o", tmp_path / f"{command[0]}{n}", processes=n) for n in (1, 2))
        assert one.returncode == two.returncode == 0, two.stderr[-3000:]
        facts = [json.loads(done.stdout) for done in (one, two)]  # one document, of the first process
        assert facts[0]["accuracy"] == facts[1]["accuracy"] and facts[0]["after"] == facts[1]["after"]
        assert (tmp_path / f"{command[0]}2" / "report.html").is_file()
    refused = run("-m", "secateur", "prune", f"{NETS}:net", "--input", "1x1x8x8", "--at-most", "macs=60%", processes=2)
    assert refused.returncode != 0 and "Add --data DATA, or leave torchrun out" in refused.stderr
