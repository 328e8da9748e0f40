"""Quality on new rows, intervals over seeds, and the study of `secateur generalise`."""

import json
import math
import statistics
from fractions import Fraction

import pytest
import torch
import typer
from torch import nn

from secateur import cli_generalise
from secateur.cli_generalise import FILE, Study, generalise, summary
from secateur.errors import DataError, FormatError, InputError, ModelError
from secateur.models import LoadedModel
from secateur.models.data import Batches, Data
from secateur.models.quality import accuracy
from secateur.recover.generalise import generalisation, interval, noisy, paired, quality_of, student_t
from secateur.recover.loop import Recovered


class Counting(nn.Module):
    """A network with a statistic, dropout and a counter, all of which a measurement must leave alone."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return 3 * self.head(self.drop(self.norm(x)))


def rows(n=200, seed=0, size=32):
    g = torch.Generator().manual_seed(seed)
    return Batches(torch.randn(n, 6, generator=g), torch.randint(4, (n,), generator=g), size)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Counting()


# ---------------------------------------------------------------- one model
def slow_quality(model, data):
    """Row by row and bin by bin, in Python's own numbers."""
    bins, loss, hits = {}, 0.0, 0
    with torch.no_grad():
        scores = model(data.inputs).double()
    for row, label in zip(scores.tolist(), data.labels.tolist(), strict=True):
        total = sum(math.exp(s) for s in row)
        sure, right = max(math.exp(s) / total for s in row), row.index(max(row)) == label
        loss -= math.log(math.exp(row[label]) / total)
        hits += right
        bins.setdefault(next(b for b in range(1, 16) if sure <= b / 15 or b == 15), []).append((sure, right))
    ece = sum(abs(sum(r for _, r in held) - sum(s for s, _ in held)) for held in bins.values()) / len(scores)
    return hits / len(scores), loss / len(scores), ece, len(bins)


def test_quality_is_that_of_a_loop(net):
    net.eval()
    data = rows()
    with torch.no_grad():
        sure, said = net(data.inputs).softmax(1).max(1)
    data = Batches(data.inputs, torch.where(sure < 0.7, said, data.labels), 32)  # too modest in the lower bins, too sure in the upper ones
    right, loss, ece, bins = slow_quality(net, data)
    found = quality_of(net, data)
    assert bins > 5 and found.rows == 200 and found.accuracy == pytest.approx(right)
    assert found.loss == pytest.approx(loss, rel=1e-6) and found.ece == pytest.approx(ece, rel=1e-6)
    assert found.ece > 1.5 * abs(right - float(sure.mean())) and found.accuracy == accuracy(net, data)


def test_quality_does_not_depend_on_the_batches(net):
    whole, parts = quality_of(net, rows(size=200)), quality_of(net, rows(size=7))
    assert whole.to_json() == pytest.approx(parts.to_json(), rel=1e-6)


class Sure(nn.Module):
    """Says the class that an input names, of two, with a probability."""

    def __init__(self, p):
        super().__init__()
        self.odds = math.log(p / (1 - p))

    def forward(self, x):
        return self.odds * nn.functional.one_hot(x[:, 0].long(), 2).double()


@pytest.mark.parametrize(("p", "right", "ece"), [(0.8, 80, 0.0), (0.8, 50, 0.3), (0.6, 100, 0.4), (0.999999, 100, 1e-6)])
def test_calibration_error_of_a_constant_confidence(p, right, ece):
    data = Batches(torch.zeros(100, 1), (torch.arange(100) >= right).long(), 30)
    found = quality_of(Sure(p), data)
    assert found.ece == pytest.approx(ece, abs=1e-9)
    assert found.loss == pytest.approx(-(right * math.log(p) + (100 - right) * math.log(1 - p)) / 100)


def test_a_bin_has_its_upper_edge():
    """Confidence 1 shares the last bin, (14/15, 1], with 0.95: being sure and wrong there makes up for being modest and right."""
    likely = [math.log(0.95), math.log(0.05)]

    class Two(nn.Module):
        def forward(self, x):
            return torch.where(x == 1, torch.tensor([1000.0, 0.0]), torch.tensor(likely)).double()

    found = quality_of(Two(), Batches(torch.tensor([[1.0]] * 10 + [[0.0]] * 10), torch.tensor([1] + [0] * 19)))
    assert found.ece == pytest.approx(abs(19 / 20 - (1 + 0.95) / 2), abs=1e-6)


def test_the_model_is_left_as_it_was(net):
    net.train()
    net.head.eval()
    before, flags = {n: t.clone() for n, t in net.state_dict().items()}, [m.training for m in net.modules()]
    random = torch.random.get_rng_state()
    generalisation(net, Data("rows", rows(), rows(seed=1), True))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert [m.training for m in net.modules()] == flags and net.calls == 0
    assert torch.equal(torch.random.get_rng_state(), random) and torch.is_grad_enabled()


def test_scores_that_are_not_finite_are_refused(net):
    with torch.no_grad():
        net.head.bias[0] = math.nan
    with pytest.raises(ModelError, match="200 of 200 rows of a batch scores that are not finite"):
        quality_of(net, rows(size=200))


# ---------------------------------------------------------------- noise
def test_no_noise_is_no_noise_and_much_is_chance():
    data = rows(2000)
    data = Batches(data.inputs * 5 + 3, (data.inputs[:, 0] > 0).long())
    model = nn.Linear(6, 2)
    with torch.no_grad():
        model.weight.zero_()[1, 0] = 1
        model.bias.copy_(torch.tensor([3.0, 0.0]))
    assert noisy(model, data, 0.0) == accuracy(model, data) == 1
    some, more, most = (noisy(model, data, sigma) for sigma in (0.2, 1.0, 100.0))
    assert 1 > some > more > most and most == pytest.approx(0.5, abs=0.05)
    # the sign of x + sigma e is that of x for a share of 1/2 + arctan(1 / sigma) / pi of the rows: the noise has the size it should have
    assert some == pytest.approx(0.5 + math.atan(1 / 0.2) / math.pi, abs=0.02) and more == pytest.approx(0.75, abs=0.03)
    assert noisy(model, data, 0.2) == some and noisy(model, data, 1.0, seed=1) != more


def test_noise_is_of_the_deviation_of_all_rows_together():
    held = rows(4000, size=1000)
    data = Batches(held.inputs + 10 * (torch.arange(4000) // 1000)[:, None], held.labels, 1000)  # batches of very different means
    seen = []

    class Looking(nn.Linear):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x)

    noisy(Looking(6, 4), data, 0.5)
    noise = torch.cat(seen) - data.inputs
    assert float(noise.std()) == pytest.approx(0.5 * float(data.inputs.std()), rel=0.02) and abs(float(noise.mean())) < 0.2
    assert torch.corrcoef(torch.stack([noise.flatten(), held.inputs.flatten()]))[0, 1].abs() < 0.05, "rows drawn from the same seed are not the noise"


def test_noise_leaves_the_rows_alone(net):
    data = rows()
    before = data.inputs.clone()
    noisy(net, data, 1.0)
    assert torch.equal(data.inputs, before)


@pytest.mark.parametrize(
    ("batches", "sigma", "kind", "said"),
    [
        (rows(), -0.1, InputError, "no size of noise"),
        (rows(), math.nan, InputError, "no size of noise"),
        (iter(rows()), 0.1, InputError, "only once"),
        (Batches(torch.ones(4, 6).long(), torch.zeros(4)), 0.1, DataError, "these are int64"),
        (Batches(torch.ones(4, 6)), 0.1, DataError, "no \\(inputs, labels\\)"),
        ([], 0.1, DataError, "no rows"),
    ],
)
def test_noise_that_cannot_be_meant(net, batches, sigma, kind, said):
    with pytest.raises(kind, match=said):
        noisy(net, batches, sigma)


# ---------------------------------------------------------------- train and test
def test_a_model_that_memorised_has_a_gap():
    """The nearest training row's label: all right on the training rows, chance on others."""
    train, test = rows(50), rows(400, seed=1)

    class Nearest(nn.Module):
        def forward(self, x):
            nearest = torch.cdist(x, train.inputs).argmin(1)
            return 5 * nn.functional.one_hot(train.labels[nearest], 4).float()

    found = generalisation(Nearest(), Data("rows", train, test, True), noise=(0.0, 0.5))
    assert found.train.accuracy == 1 and found.test.accuracy < 0.4
    assert found.gap == found.train.accuracy - found.test.accuracy > 0
    assert found.loss_gap == found.test.loss - found.train.loss > 0
    assert found.noise[0.0] == found.test.accuracy and set(found.noise) == {0.0, 0.5}
    swapped = generalisation(Nearest(), Data("rows", test, train, True), noise=())
    assert swapped.gap == -found.gap and swapped.loss_gap == -found.loss_gap and not swapped.noise
    assert json.loads(json.dumps(found.to_json()))["noise"]["0.5"] == found.noise[0.5]


# ---------------------------------------------------------------- intervals
TABLE = {  # degrees of freedom: two-sided 90, 95 and 99 % of Student's t, as printed in every book of statistics
    1: (6.314, 12.706, 63.657), 2: (2.920, 4.303, 9.925), 3: (2.353, 3.182, 5.841), 4: (2.132, 2.776, 4.604), 5: (2.015, 2.571, 4.032),
    7: (1.895, 2.365, 3.499), 8: (1.860, 2.306, 3.355), 15: (1.753, 2.131, 2.947), 30: (1.697, 2.042, 2.750), 120: (1.658, 1.980, 2.617),
}  # fmt: skip


@pytest.mark.parametrize("freedom", TABLE)
def test_students_t_is_that_of_the_tables(freedom):
    found = [student_t(freedom, c) for c in (0.90, 0.95, 0.99)]
    assert found == pytest.approx(TABLE[freedom], abs=6e-4)


def test_students_t_becomes_the_normal_distribution():
    assert student_t(100_001) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-4)


def test_an_interval_by_hand():
    found = interval([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5 and found.half == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-6)
    assert (found.low, found.high) == (found.mean - found.half, found.mean + found.half) and found.count == 4
    assert interval([5.0, 5.0]).half == 0 and interval([1, 2, 3, 4], 0.5).half < found.half
    alone = interval([7.0])
    assert alone.mean == 7 and math.isinf(alone.half) and json.dumps(alone.to_json(), allow_nan=False)


@pytest.mark.parametrize(("count", "confidence"), [(3, 0.95), (8, 0.95), (5, 0.8)])
def test_an_interval_covers_as_often_as_it_says(count, confidence):
    draws = torch.randn(4000, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 10
    quantile = student_t(count - 1, confidence)  # the same for all: only the first one is taken the long way
    one = interval(draws[0].tolist(), confidence)
    halves = quantile * draws.std(1) / math.sqrt(count)
    assert one.half == pytest.approx(float(halves[0])) and one.mean == pytest.approx(float(draws[0].mean()))
    share = float(((draws.mean(1) - 10).abs() <= halves).double().mean())
    assert share == pytest.approx(confidence, abs=0.015)  # two and a half standard errors at 0.8, four at 0.95


def test_pairs_lose_what_they_share():
    shared = torch.randn(10, generator=torch.Generator().manual_seed(0)).tolist()
    a, b = [100 * s + 1 for s in shared], [100 * s for s in shared]
    found = paired(a, b)
    assert found.mean == pytest.approx(1) and found.half < 1e-9 < interval(a).half
    assert paired(b, a).mean == pytest.approx(-1)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: interval([]), "no values"),
        (lambda: interval([1.0, math.nan]), "1 of 2 values that are not finite"),
        (lambda: interval([1.0, 2.0], 95), "no probability"),
        (lambda: paired([1.0], [1.0, 2.0]), "no pairs"),
    ],
)
def test_intervals_that_cannot_be_meant(call, said):
    with pytest.raises(InputError, match=said):
        call()


# ---------------------------------------------------------------- the study
@pytest.fixture
def trained(monkeypatch):
    """A stand-in for the training: shifts what stays by an amount that depends on the seed; remembers its calls."""
    calls = []

    def recover(model, batches, how, *, plan=None):
        calls.append((how.seed, None if plan is None else float(plan.why["keep"]), how.epochs, how.lr))
        stays = plan.weights if plan is not None else {}
        g = torch.Generator().manual_seed(how.seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=g) * stays.get(name, torch.ones_like(p)))
        return Recovered(model, [])

    monkeypatch.setattr(cli_generalise, "recover", recover)
    return calls


def study(**changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    data = Data("rows", rows(), rows(seed=1), True)
    how = {"model": "net", "data": "rows", "by": "magnitude", "epochs": 2.0, "lr": None, "noise": [0.1, 0.2], **changes}
    return Study(LoadedModel(model, None, "net"), ((rows().inputs[:2],), {}), data, how)


def shares(text):
    return cli_generalise._shares(text)


def quiet(stage):
    return None


def test_every_seed_and_share_is_trained_and_measured(trained):
    held = study()
    before = {n: t.clone() for n, t in held.loaded.model.state_dict().items()}
    facts = held.run(shares("50%,0.1,50%"), 2, None, quiet)
    assert trained == [(0, None, 2.0, None), (0, 0.5, 2.0, None), (0, 0.1, 2.0, None), (1, None, 2.0, None), (1, 0.5, 2.0, None), (1, 0.1, 2.0, None)]
    assert all(torch.equal(t, before[n]) for n, t in held.loaded.model.state_dict().items()), "the given model was trained"
    assert [(row["keep"], row["seed"]) for row in facts["rows"]] == [(k, s) for s in (0, 1) for k in ("100%", "50%", "10%")]
    assert [row["stays"] for row in facts["rows"][:3]] == [1, 0.5, pytest.approx(0.1, abs=0.01)]
    assert facts["given"] == generalisation(held.loaded.model, held.data).to_json()
    assert len({row["test"]["loss"] for row in facts["rows"]}) == 6


def test_the_summary_is_paired_by_seed(trained):
    facts = study().run(shares("50%"), 3, None, quiet)
    test = {(row["keep"], row["seed"]): row["test"]["accuracy"] for row in facts["rows"]}
    dense, half = facts["summary"]
    assert dense["against_dense"] is None and dense["keep"] == "100%" and half["keep"] == "50%"
    away = [test["50%", s] - test["100%", s] for s in range(3)]
    assert half["against_dense"]["mean"] == pytest.approx(sum(away) / 3)
    assert half["against_dense"]["half"] == pytest.approx(4.302653 * statistics.stdev(away) / math.sqrt(3), rel=1e-5)
    mixed = list(reversed(facts["rows"]))  # the order of the rows in a file says nothing
    assert summary(mixed, shares("50%")[1], 3)["against_dense"] == pytest.approx(half["against_dense"])


def test_a_run_goes_on_where_it_was_killed(trained, tmp_path, monkeypatch):
    whole = study().run(shares("50%,10%"), 2, None, quiet)
    trained.clear()
    fourth = cli_generalise.recover

    def killed(*args, **kwargs):
        if len(trained) == 4:
            raise KeyboardInterrupt
        return fourth(*args, **kwargs)

    monkeypatch.setattr(cli_generalise, "recover", killed)
    with pytest.raises(KeyboardInterrupt):
        study().run(shares("50%,10%"), 2, tmp_path, quiet)
    assert len(json.loads((tmp_path / FILE).read_text())["rows"]) == 4, "rows are written one by one"
    trained.clear()
    monkeypatch.setattr(cli_generalise, "recover", fourth)
    facts = study().run(shares("50%,10%"), 2, tmp_path, quiet)
    assert [(seed, keep) for seed, keep, *_ in trained] == [(1, 0.5), (1, 0.1)], "only what was missing"
    assert facts == whole and [path.name for path in tmp_path.iterdir()] == [FILE]
    trained.clear()
    assert study().run(shares("50%,10%"), 2, tmp_path, quiet) == whole and not trained
    study().run(shares("20%"), 1, tmp_path, quiet)
    assert [(seed, keep) for seed, keep, *_ in trained] == [(0, 0.2)], "other shares join those that are there"


def test_rows_of_other_settings_are_not_mixed(trained, tmp_path):
    study().run(shares("50%"), 1, tmp_path, quiet)
    with pytest.raises(InputError, match="holds 2 rows of other settings: epochs differ"):
        study(epochs=3.0).run(shares("50%"), 1, tmp_path, quiet)
    other = study()
    with torch.no_grad():
        other.loaded.model[0].bias[0] += 1
    with pytest.raises(InputError, match="state differ"):
        other.run(shares("50%"), 1, tmp_path, quiet)
    (tmp_path / FILE).write_text('{"settings": {}, "rows": [1]}')
    with pytest.raises(FormatError, match="cannot be read as the rows of a study"):
        study().run(shares("50%"), 1, tmp_path, quiet)


def test_a_kill_while_writing_leaves_the_rows_before(trained, tmp_path, monkeypatch):
    study().run(shares("50%"), 1, tmp_path, quiet)
    before = (tmp_path / FILE).read_text()

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli_generalise, "sync", full)  # as the new rows reach the disk
    with pytest.raises(FormatError, match=r"No space left.*\n.*rows before are unchanged"):
        study().run(shares("20%"), 1, tmp_path, quiet)
    assert (tmp_path / FILE).read_text() == before and [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_reader_of_the_file_never_sees_half_of_it(trained, tmp_path):
    study().run(shares("50%"), 1, tmp_path, quiet)
    with (tmp_path / FILE).open() as old:
        study().run(shares("20%"), 1, tmp_path, quiet)
        assert len(json.loads(old.read())["rows"]) == 2, "the old file is whole as long as someone holds it"
    assert len(json.loads((tmp_path / FILE).read_text())["rows"]) == 3


def test_a_folder_that_cannot_be_written(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="could not be written"):
        study().run(shares("50%"), 1, tmp_path / "file" / "folder", quiet)


# ---------------------------------------------------------------- the command
@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import torch\n\ndef net():\n    torch.manual_seed(0)\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    app = typer.Typer()
    app.command()(generalise)

    def run(*arguments):
        app([str(a) for a in arguments], standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_the_command_trains_for_real(run, tmp_path):
    arguments = ["own.py:net", "--data", "digits", "--keep", "20%", "--epochs", 3, "--seeds", 2, "--lr", 0.01, "-o", "out"]
    facts = json.loads(run(*arguments, "--json"))
    dense, pruned = facts["summary"]
    assert facts["given"]["test"]["accuracy"] < 0.3 < 0.7 < dense["test_accuracy"]["mean"]
    assert pruned["stays"] == 0.2 and dense["test_accuracy"]["half"] is not None
    text = run(*arguments)
    assert json.loads((tmp_path / "out" / FILE).read_text())["rows"] == facts["rows"]
    assert f"{100 * pruned['against_dense']['mean']:+.2f} ± {100 * pruned['against_dense']['half']:.2f}" in text
    assert "given" in text and "over 2 seeds" in text and "written: out/generalise.json" in text
    assert "no telling chance" in run("own.py:net", "--data", "digits", "--keep", "20%", "--epochs", 1, "--seeds", 1)


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ([], InputError, "no data is given"),
        (["--data", "digits", "--keep", "120%"], InputError, "a share lies above 0"),
        (["--data", "digits", "--epochs", "0"], InputError, "no length of training"),
        (["--data", "digits", "--lr", "-1"], InputError, "no learning rate"),
        (["--data", "digits", "--by", "best"], InputError, "unknown method"),
        (["--data", "npz:plain.npz"], DataError, "has no labels"),
    ],
)
def test_commands_that_cannot_be_meant(run, tmp_path, arguments, kind, said):
    import numpy as np

    np.savez(tmp_path / "plain.npz", images=np.zeros((8, 8, 8), np.float32))
    with pytest.raises(kind, match=said):
        run("own.py:net", *arguments)


def test_a_list_of_batches_has_an_order_of_its_own_for_every_seed_and_other_training_rows_are_other_rows(net, tmp_path):
    train, test = rows(64), rows(64, seed=1)

    def study(train):
        data = cli_generalise._cast(net, Data("rows", list(train), test, True))
        return Study(LoadedModel(net, (train.inputs[:2],), "net"), ((train.inputs[:2],), {}), data, {"by": "magnitude", "epochs": 1.0, "lr": 0.05})

    found = study(train).run([Fraction(1)], 3, tmp_path, lambda stage: None)
    assert len({row["train"]["loss"] for row in found["rows"]}) == 3
    with pytest.raises(InputError, match="train_rows"):
        study(Batches(train.inputs, train.labels.flip(0), 32)).run([Fraction(1)], 3, tmp_path, lambda stage: None)


def test_seeds_that_change_nothing_have_no_interval():
    net = nn.Linear(6, 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows(64).inputs, rows(64).labels), 32)
    data = cli_generalise._cast(net, Data("rows", loader, rows(64, seed=1), True))
    held = Study(LoadedModel(net, (rows().inputs[:2],), "net"), ((rows().inputs[:2],), {}), data, {"by": "magnitude", "epochs": 1.0, "lr": 0.05})
    with pytest.raises(InputError, match="seeds 0 and 1 gave the same model with 100% of the weights"):
        held.run([Fraction(1)], 2, None, quiet)
    assert len(held.run([Fraction(1)], 1, None, quiet)["rows"]) == 1
