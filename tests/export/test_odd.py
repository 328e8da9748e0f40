"""Odd models and odd settings: the file is the model, or there is one clear error and no file."""

from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import export
from secateur.cli import main
from secateur.errors import FormatError, InputError, ModelError
from secateur.export import check
from secateur.export.runner import File, Run
from secateur.models.recipe import captured


def test_one_output_that_is_no_number_is_enough_to_refuse(monkeypatch):
    class Two(nn.Module):
        def forward(self, x):
            return x, x + 1

    x = torch.ones(2, 3)
    file, lost = File(Path("m.pt2"), "pt2"), torch.full((2, 3), float("nan"))
    for found in ([x, lost], [lost, x + 1]):
        monkeypatch.setattr(check, "run", lambda *_, found=found: Run([[t.numpy() for t in found]], None, 0, 0, ""))
        with pytest.raises(ModelError, match="deviates from torch by nan") as said:
            check.checked(Two(), file, [((x,), {})])
        assert "--tolerance" not in str(said.value)


class Calls(nn.Module):
    """A layer, and what a function makes of it."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.layer(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_gives_no_number_proves_nothing(here, tmp_path, value):
    model = Calls(lambda y: (y, y * 0 + value))
    with pytest.raises(ModelError, match="Calls gives nothing but NaN or infinity on a batch of 2"):
        export.pt2(model, (torch.randn(2, 4),), tmp_path / "p", how=export.How(rounds=0))
    assert not list(tmp_path.iterdir())
    masked = Calls(lambda y: torch.cat([y, y * 0 + value], 1))  # some of it may be: masks are
    assert export.pt2(masked, (torch.randn(2, 4),), tmp_path / "p", how=export.How(rounds=0, batches=())).deviation < 1e-6


def test_batches_that_the_model_does_not_run_are_not_held_against_the_file(here, tmp_path):
    """It takes pairs of rows: 1 and 5, which are tried on our own account, are none."""
    how = export.How(rounds=0, batches=(1, 6, 5))
    done = export.pt2(Calls(lambda y: y.view(-1, 2, 4) + 1), (torch.randn(4, 4),), tmp_path / "p", how=how)
    assert done.dynamic and [row.batch for row in done.deviations] == [4, 6]
    assert any("not checked with batches of 1, 5" in note for note in done.notes)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("function", [
    lambda y: y if y.shape[0] > 1 else -y, lambda y: y.view(y.shape[0], -1, 2 * y.shape[0]),
], ids=["a branch", "a division"])  # fmt: skip
def test_a_batch_that_capturing_decides_on_is_written_in_and_said(here, tmp_path, function, rows):
    """torch.export keeps the batch free and forgets the branch that another one would take."""
    x = torch.randn(rows, 4)
    done = export.pt2(Calls(function), (x,), tmp_path / "p", how=export.How(rounds=0, batches=(1, 3)))
    assert not done.dynamic and [row.batch for row in done.deviations] == [rows] and any("could not keep the batch free" in n for n in done.notes)
    assert torch.allclose(torch.export.load(done.path).module()(x), Calls(function)(x), atol=1e-6)


class Reads(nn.Module):
    """A convolution over five tokens without padding; `last` looks at the last of them alone, by its number."""

    def __init__(self, last=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv, self.head, self.last = nn.Embedding(40, 16), nn.Conv1d(16, 16, 5), nn.Linear(16, 4), last

    def forward(self, ids):
        x = self.embed(ids).transpose(1, 2)
        x = self.conv(x * x.shape[1] ** -0.5).relu()
        return self.head(x[:, :, ids.shape[1] - 5] if self.last else x.amax(2))


def test_the_fewest_tokens_are_said_and_more_are_tried(here, tmp_path):
    model, ids = Reads(), torch.randint(40, (2, 10))
    done = export.pt2(model, (ids,), tmp_path / "p", how=export.How(rounds=0, batches=(1,)))
    assert [(row.batch, row.tokens) for row in done.deviations] == [(2, 10), (1, 10), (2, 6), (2, 15)] and done.deviation < 1e-6
    assert "rows of fewer than 5 tokens are not taken" in done.notes and not any("no more" in note for note in done.notes)
    longer = torch.randint(40, (3, 23))
    assert torch.allclose(torch.export.load(done.path).module()(longer), model(longer), atol=1e-6)


def test_a_length_that_is_a_number_of_the_graph_is_written_in(here, tmp_path):
    """A rewritten graph reads the tenth token however many there are; longer rows would come out wrong, and be taken."""
    ids = torch.randint(40, (2, 10))
    cut = sc.prune(Reads(last=True), (ids,), sc.MACs(at_most="60%"))
    assert cut.cut.how == "graph"
    for model in (cut.model, Reads(last=True)):  # its class reads the length
        done = export.pt2(model, (ids,), tmp_path / "p", how=export.How(rounds=0, batches=(1,)))
        taken = torch.export.load(done.path).module()
        assert torch.allclose(taken(ids), model(ids), atol=1e-6) and done.dynamic
        assert any("10 tokens, no more and no less" in note for note in done.notes) is (model is cut.model)
        longer = torch.randint(40, (2, 17))
        if model is cut.model:
            assert {row.tokens for row in done.deviations} == {10}
            with pytest.raises((RuntimeError, AssertionError)):
                taken(longer)
        else:
            assert torch.allclose(taken(longer), model(longer), atol=1e-6)


def test_a_length_that_the_program_refuses_is_written_in(here, tmp_path):
    """torch.export keeps a branch on odd lengths as an assertion, which no range of lengths tells of."""

    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(40, 16)

        def forward(self, ids):
            return self.embed(ids).cumsum(1) * (1 if ids.shape[1] % 2 == 0 else -1)

    done = export.pt2(Turns(), (torch.randint(40, (2, 10)),), tmp_path / "p", how=export.How(rounds=0, batches=(1,)))
    assert done.dynamic and [(row.batch, row.tokens) for row in done.deviations] == [(2, 10), (1, 10)]
    assert any("10 tokens, no more and no less" in note for note in done.notes)


def test_an_export_leaves_what_a_forward_writes(here, tmp_path):
    """In the model and in the file; one row, which the export doubles."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 4, max_norm=0.5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, ids):
            self.calls += 1
            return self.embed(ids) + self.calls

    model = Counts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = export.pt2(model, (torch.arange(10).view(1, 10),), tmp_path / "p", how=export.How(rounds=0, batches=(2,)))
    held = torch.export.load(done.path).state_dict
    assert all(torch.equal(model.state_dict()[name], value) and torch.equal(held[name], value) for name, value in before.items())
    assert done.dynamic  # the program is compared with the model in the state of before


def test_of_inputs_to_check_with_those_of_a_written_in_batch_are_used(here, tmp_path):
    x = torch.randn(2, 4)
    calls = (((torch.randn(2, 4),), {}), ((torch.randn(3, 4),), {}), ((torch.randn(2, 4),), {}))
    done = export.pt2(Calls(lambda y: y if y.shape[0] > 1 else -y), (x,), tmp_path / "p", how=export.How(rounds=0, calls=calls))
    assert not done.dynamic and [row.batch for row in done.deviations] == [2, 2]
    assert any("not checked with 1 of the inputs given" in n for n in done.notes)


def test_inputs_without_rows_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no rows \(\(0, 4\) float32\)"):
        export.pt2(nn.Linear(4, 4), (torch.randn(0, 4),), tmp_path / "p")


@pytest.mark.parametrize("odd", [
    {"threads": 0}, {"threads": 10**6}, {"rounds": 1}, {"rounds": -2}, {"tolerance": float("nan")}, {"tolerance": -1.0}, {"batches": (0,)},
    {"batches": (2.5,)},
], ids=str)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused_before_any_work(tmp_path, monkeypatch, odd):
    monkeypatch.setattr(export.stages, "write", None)
    with pytest.raises(InputError, match=next(iter(odd))):
        export.pt2(nn.Linear(4, 4), (torch.randn(2, 4),), tmp_path / "p", how=export.How(**odd))


def test_the_command_refuses_them_before_it_loads_a_model(capsys):
    assert main(["export", "no.such:model", "--to", "pt2", "--rounds", "1"]) == 2
    assert "rounds=1" in capsys.readouterr().err


@pytest.mark.parametrize("facts", ["{}", "[]", "{", '{"files": 3}'])
def test_an_export_json_that_is_not_ours_is_not_replaced(here, tmp_path, facts):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "export.json").write_text(facts)
    with pytest.raises(InputError, match="did not write"):
        export.pt2(nn.Linear(4, 4), (torch.randn(2, 4),), tmp_path / "p", how=export.How(rounds=0, batches=()))
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["export.json"] and (tmp_path / "p" / "export.json").read_text() == facts


def test_a_name_that_no_folder_can_have(tmp_path):
    with pytest.raises(FormatError, match="File name too long"):
        export.pt2(nn.Linear(4, 4), (torch.randn(2, 4),), tmp_path / ("a" * 300))


def test_a_capture_that_fails_leaves_no_marks_on_the_inputs():
    """The next attempt would find its dimensions free again, and fail alike."""
    x = torch.randn(2, 4)
    found, why = captured(Calls(lambda y: y.view(y.shape[0], -1, 2 * y.shape[0])), (x,), {})
    assert found is not None, why
    assert not [name for name in vars(x) if "dynamic" in name]


def test_an_onnx_file_goes_where_a_file_can_be(tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    (tmp_path / "file").write_text("mine")
    model, args = nn.Linear(4, 4), (torch.randn(2, 4),)
    with pytest.raises(InputError, match="is a folder; the file needs a name"):
        export.onnx_file(model, args, tmp_path)
    for place in ("file/m.onnx", f"{'a' * 250}.onnx"):
        with pytest.raises(FormatError, match="could not be written"):
            export.onnx_file(model, args, tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
