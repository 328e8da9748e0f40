"""An export is the model, and runs in a process of its own without secateur; or it is not there. Torch's own format: it is there everywhere."""

import json
import os
import zipfile

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import export
from secateur.cli import main
from secateur.errors import CaptureError, InputError, ModelError
from secateur.export import runner, stages
from secateur.export.capture import capture, named

QUICK = export.How(rounds=0, batches=(1, 3))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 4)
    )


def x(rows=2):
    return torch.randn(rows, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def things(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a pruned network, and the network."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    result = sc.prune(net(), (x(),), sc.MACs(at_most="50%"), repair="none")
    sc.save(result, folder)
    return folder, result.model


def test_the_file_alone_gives_what_the_model_gives(saved, tmp_path, monkeypatch):
    """A package secateur that cannot be imported lies in the child's way: the file runs without it."""
    trap = tmp_path / "trap" / "secateur"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise RuntimeError('the child imported secateur')")
    monkeypatch.setenv("PYTHONPATH", str(trap.parent))
    model = saved[1].train()  # dropout would show
    done = export.pt2(model, (x(),), tmp_path / "to" / "p", how=QUICK)
    assert model.training
    model.eval()
    again = torch.export.load(done.path).module()
    for rows in (1, 7):
        assert torch.allclose(again(x(rows)), model(x(rows)), atol=1e-6)
    assert done.dynamic and [row.batch for row in done.deviations] == [2, 1, 3] and done.deviation < 1e-5
    assert done.peak_bytes["pruned"] > done.idle_bytes > 0 and done.bytes == done.path.stat().st_size and done.seconds is None
    assert things(tmp_path / "to") == ["p"] and things(done.folder) == ["export.json", "model.pt2"]
    facts = json.loads((done.folder / "export.json").read_text())
    assert facts["files"]["model.pt2"]["bytes"] == done.bytes and facts["export"] == "pt2" and facts["tolerance"] == 1e-4
    assert facts["deviations"] == [vars(row) for row in done.deviations]


def test_the_dense_model_stands_beside(here, saved, tmp_path):
    done = export.pt2(saved[1], (x(),), tmp_path / "p", dense=net(), how=export.How(rounds=2, batches=()))
    assert set(done.seconds.seconds) == set(done.peak_bytes) == {"dense", "pruned"} and done.seconds.ratio["dense"] == 1.0
    assert done.bytes < done.dense_bytes and done.seconds.seconds["pruned"].batch == 2 and things(done.folder) == ["export.json", "model.pt2"]
    odd = export.pt2(saved[1], (x(),), tmp_path / "q", dense=nn.Linear(3, 3), how=export.How(rounds=2, batches=()))
    assert set(odd.peak_bytes) == {"pruned"} and any("dense model could not be measured" in note for note in odd.notes)


def test_a_file_that_computes_something_else_is_refused_and_the_old_one_stays(here, tmp_path, monkeypatch):
    folder = tmp_path / "p"
    export.pt2(net(), (x(),), folder, how=QUICK)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    written = stages.write

    def wrong(format, model, call, at):
        other = net()
        with torch.no_grad():
            other[-1].bias += 1e-3
        return written(format, other, call, at)

    monkeypatch.setattr(stages, "write", wrong)
    with pytest.raises(ModelError, match=r"(?s)deviates from torch by .*--tolerance"):
        export.pt2(net(), (x(),), folder, how=QUICK)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and things(tmp_path) == ["p"]
    done = export.pt2(net(), (x(),), folder, how=export.How(tolerance=1.0, rounds=0))
    assert 1e-4 < done.deviation < 1 and done.deviations[0].absolute == pytest.approx(1e-3, rel=0.1)


def test_other_peoples_files_stay(here, tmp_path, saved):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="did not write"):
        export.pt2(net(), (x(),), tmp_path, how=QUICK)
    with pytest.raises(InputError, match="holds a pruned model"):
        export.pt2(net(), (x(),), saved[0], how=QUICK)
    assert things(tmp_path) == ["notes.txt"] and (saved[0] / "plan.json").is_file()


@pytest.mark.parametrize("facts", [None, "[]", '{"files": {"model.pt2": {}}}'])
def test_a_file_that_has_the_name_of_an_export_is_not_taken_for_one(facts, tmp_path):
    (tmp_path / "model.pt2").write_text("the only copy")
    if facts:
        (tmp_path / "export.json").write_text(facts)
    with pytest.raises(InputError, match=r"did not write \(.*model.pt2\), going by export.json"):
        export.pt2(net(), (x(),), tmp_path, how=QUICK)
    assert (tmp_path / "model.pt2").read_text() == "the only copy"


def test_sparse_layers_cannot_be_exported(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model[0] = sc.runtime.SparseLinear.of(model[0])
    with pytest.raises(ModelError, match=r"(?s)0 is a SparseLinear: .*before runtime.convert"):
        export.pt2(model, (torch.randn(2, 8),), tmp_path / "p")
    with pytest.raises(ModelError, match="bfloat16"):
        export.pt2(nn.Linear(2, 2).bfloat16(), (torch.randn(2, 2).bfloat16(),), tmp_path / "p")
    assert not things(tmp_path)


def test_what_cannot_be_meant(tmp_path):
    class Branches(nn.Module):
        def forward(self, t):
            return t if t.sum() > 0 else -t

    with pytest.raises(CaptureError, match="Branches could not be captured"):
        export.pt2(Branches(), (x(),), tmp_path / "p")
    with pytest.raises(InputError, match="no tensor among the inputs"):
        export.pt2(net(), (), tmp_path / "p")
    with pytest.raises(InputError, match="unknown format"):
        export.to("coreml", net(), ((x(),), {}), tmp_path / "p")
    assert not things(tmp_path)


def test_a_batch_that_is_written_in_is_said_and_kept(here, tmp_path):
    class Fixed(nn.Module):
        def forward(self, t):
            return t.reshape(2, 3 * 12 * 12) * 2

    done = export.pt2(Fixed(), (x(),), tmp_path / "p", how=QUICK)
    assert not done.dynamic and [row.batch for row in done.deviations] == [2] and any("batch" in note for note in done.notes)


def test_the_inputs_given_are_not_in_the_file(here, tmp_path):
    secret = torch.full((2, 3, 12, 12), 0.1234567)
    done = export.pt2(net(), (secret,), tmp_path / "p", how=QUICK)
    with zipfile.ZipFile(done.path) as archive:
        held = b"".join(archive.read(name) for name in archive.namelist())
    assert secret.numpy().tobytes()[:64] not in held and list(done.inputs) == ["input"]


def test_zeros_are_said_to_be_dense(here, tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    with torch.no_grad():
        model[0].weight[torch.rand(64, 64) < 0.75] = 0
    zeros = float((model[0].weight == 0).float().mean())
    done = export.pt2(model, (torch.randn(2, 64),), tmp_path / "p", how=QUICK)
    note = next(note for note in done.notes if "zero" in note)
    whole, packed = (int(word.replace(",", "")) for word in note.split() if word.replace(",", "").isdigit() and len(word) > 3)
    assert f"{100 * zeros:.0f} % of the weights" in note and whole == done.bytes and packed < 0.7 * whole
    assert not any("zero" in note for note in export.pt2(net(), (x(),), tmp_path / "q", how=QUICK).notes)


class Answer(dict):
    """A class of its own, as libraries return: whoever loads the file does not have it."""


def test_keywords_nested_inputs_and_outputs(here, tmp_path):
    class Named(nn.Module):
        def forward(self, pair, *, scale, other=None):
            return Answer(y=pair[0] * scale - pair[1], n=[other + 1])

    a, b, scale, other = torch.randn(4, 2, 5).unbind()
    done = export.pt2(Named(), ((a, b),), tmp_path / "p", {"scale": scale, "other": other}, how=QUICK)
    assert done.deviation < 1e-6
    found = export.run(done.path, [(((a, b),), {"other": other, "scale": scale})]).outputs[0]
    assert torch.allclose(torch.from_numpy(found[0]), a * scale - b) and torch.allclose(torch.from_numpy(found[1]), other + 1)


def test_a_process_that_dies_is_told_from_one_that_refuses(tmp_path, monkeypatch):
    (tmp_path / "model.pt2").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"model.pt2 \(torch\) does not run in a process of its own"):
        export.run(tmp_path / "model.pt2", [((x(),), {})])
    child = tmp_path / "child.py"
    child.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(runner, "CHILD", child)
    with pytest.raises(ModelError, match="ended by SIGKILL"):
        export.run(tmp_path / "model.pt2", [((x(),), {})])
    with pytest.raises(InputError, match=r"File\(path, format, inputs\)"):
        export.run(tmp_path / "model.tflite", [((x(),), {})])


def test_operators_are_named_with_their_layer():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.GELU())

        def forward(self, t):
            return self.head(self.first(t))

    program = capture(Mixed(), (torch.randn(2, 4),)).program
    assert named("no kernel for aten::gelu.out", program) == "aten.gelu in 'head.1'"
    assert named("node aten.linear.default failed", program) == "aten.linear in 'first'"
    assert named("something else", program) == ""
    forgotten = capture(torch.export.export(Mixed(), (torch.randn(2, 4),)).module(), (torch.randn(2, 4),)).program
    for node in forgotten.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    assert named("aten.linear.default", forgotten) == "aten.linear in 'first.weight'"


def test_the_command(here, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(saved[0], "out")
    assert main(["export", "out", "--to", "pt2", "--rounds", "0"]) == 0
    said = capsys.readouterr().out
    assert "largest deviation" in said and "out-pt2" in said and (tmp_path / "out-pt2" / "model.pt2").is_file()
    assert main(["export", "out", "--to", "pt2", "--rounds", "0", "--json", "-o", "p"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == "pt2" and max(row["relative"] for row in facts["deviations"]) < 1e-4
    assert main(["export", "out", "--to", "hf"]) == 1
    assert "no model of transformers" in capsys.readouterr().err or not _has("transformers")
    assert main(["export", "out", "--to", "onxx"]) == 2
    assert "onnx, openvino" in capsys.readouterr().err and things(tmp_path) == ["out", "out-pt2", "p"]


def _has(package):
    from importlib.util import find_spec

    return find_spec(package) is not None


class Tokens(nn.Module):
    """Mean of embeddings; `longest` writes a length in."""

    def __init__(self, longest=None):
        super().__init__()
        self.embed, self.head, self.longest = nn.Embedding(20, 8), nn.Linear(8, 3), longest

    def forward(self, ids):
        x = self.embed(ids) if self.longest is None else self.embed(ids).reshape(-1, self.longest, 8)
        return self.head(x.cumsum(1))


def test_rows_of_tokens_may_have_any_length(here, tmp_path):
    ids = torch.randint(0, 20, (1, 10), generator=torch.Generator().manual_seed(0))
    model = Tokens()
    done = export.pt2(model, (ids,), tmp_path / "p", how=export.How(rounds=0, batches=(2,)))
    assert [(row.batch, row.tokens) for row in done.deviations] == [(1, 10), (2, 10), (1, 5), (1, 15)] and done.deviation < 1e-6
    found = torch.from_numpy(export.run(done.path, [((ids[:, :7].repeat(3, 1),), {})]).outputs[0][0])
    assert torch.allclose(found, model(ids[:, :7].repeat(3, 1)), atol=1e-6)
    fixed = export.pt2(Tokens(10), (ids,), tmp_path / "q", how=export.How(rounds=0, batches=(2,)))
    assert fixed.dynamic and [row.tokens for row in fixed.deviations] == [10, 10] and any("10 tokens, no more" in note for note in fixed.notes)
