"""Hugging Face folders: a plain config where widths are uniform, a few lines of code where they are not."""

import itertools
import json
import random
import subprocess
import sys

import pytest
import torch

import secateur as sc
from secateur import export
from secateur.errors import ModelError
from secateur.export.to_hf import solutions
from secateur.measure.run import at_rest
from secateur.models import load_model
from secateur.models.hf import import_transformers

QUICK = export.How(rounds=0, batches=(1, 2))
PLAIN = "import sys; from transformers import AutoModelForCausalLM as A; print(sum(p.numel() for p in A.from_pretrained(sys.argv[1]).parameters()))"


def llama(**sizes):
    transformers = import_transformers()
    held = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "use_cache": False, **sizes}  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**held)).eval(), {"input_ids": torch.randint(3, 60, (1, 6))}


def thinner(model, layers, width):
    """The first `width` neurons of some layers stay."""
    for layer in layers:
        mlp = model.model.layers[layer].mlp
        for linear, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            linear.weight = torch.nn.Parameter(linear.weight.detach().narrow(dim, 0, width).clone())
            linear.out_features, linear.in_features = linear.weight.shape
    return model


def config(done):
    return json.loads((done.folder / "config.json").read_text())


def test_uniform_widths_are_a_plain_config(here, tmp_path):
    pytest.importorskip("transformers")
    model, inputs = llama()
    done = export.hf(thinner(model, (0, 1), 40), (), tmp_path / "p", inputs, how=QUICK)
    held = config(done)
    assert held["intermediate_size"] == 40 and held["hidden_size"] == 32 and "auto_map" not in held and held["use_cache"] is True
    assert not list(done.folder.glob("*.py")) and done.deviation < 1e-5 and held.get("_name_or_path", "") == ""
    said = subprocess.run([sys.executable, "-c", PLAIN, str(done.folder)], capture_output=True, text=True)
    assert said.stdout.split() or "torchvision" in said.stderr  # stock code alone, where its own imports work
    if said.stdout.split():
        assert int(said.stdout) == sum(p.numel() for p in model.parameters())


def test_widths_that_nearly_agree_are_filled_with_zeros(here, tmp_path):
    pytest.importorskip("transformers")
    model, inputs = llama()
    done = export.hf(thinner(thinner(model, (0,), 40), (1,), 39), (), tmp_path / "p", inputs, how=QUICK)
    assert config(done)["intermediate_size"] == 40 and any("96 zeros" in note for note in done.notes) and done.deviation < 1e-5


def test_widths_that_differ_bring_their_code(tmp_path):
    pytest.importorskip("transformers")
    model, inputs = llama()
    done = export.hf(thinner(model, (1,), 9), (), tmp_path / "p", inputs, how=QUICK)
    held = config(done)
    assert held["auto_map"] == {"AutoModelForCausalLM": "modeling_pruned.PrunedLlamaForCausalLM"} and held["intermediate_size"] == 64
    assert held["pruned"]["shapes"]["model.layers.1.mlp.down_proj.weight"] == "32x9" and done.deviation < 1e-5
    assert (done.folder / "modeling_pruned.py").read_text().count("\n") < 40


def test_heads_that_went_are_found_with_their_own_size(here, tmp_path):
    """Half of the heads, or heads of half the size: both give the same shapes, and only one gives the same outputs."""
    pytest.importorskip("transformers")
    model, inputs = llama()
    small, _ = llama(num_attention_heads=2, num_key_value_heads=1)
    found = export.hf(_with_config_of(small, model), (), tmp_path / "p", inputs, how=QUICK)
    held = config(found)
    assert (held["num_attention_heads"], held["num_key_value_heads"], held["head_dim"]) == (2, 1, 8)


def _with_config_of(small, model):
    """A small model that still carries the configuration of the dense one, as a cut leaves it."""
    small.config = model.config
    return small


def test_what_prune_returns_and_what_a_folder_holds(here, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from secateur.cli import main

    monkeypatch.chdir(tmp_path)
    model, inputs = llama()
    model.config.save_pretrained("dense")
    model.save_pretrained("dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    assert main(["prune", "hf/dense", "--at-most", "params=70%", "--score", "l2", "-o", "out"]) == 0
    assert main(["export", "out", "--to", "hf", "--rounds", "0", "-o", "to"]) == 0
    loaded, dense = load_model("hf/dense"), load_model("hf/dense")
    pruned = sc.load("out", lambda: loaded.model)
    facts = json.loads((tmp_path / "to" / "export.json").read_text())
    assert max(row["relative"] for row in facts["deviations"]) < 1e-5 and (tmp_path / "to" / "tokenizer.json").is_file()
    assert sum(p.numel() for p in pruned.parameters()) < 0.71 * sum(p.numel() for p in dense.model.parameters())
    with at_rest(pruned):
        assert pruned(**inputs).logits.shape == (1, 6, 64)


def test_others_are_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ModelError, match=r"(?s)no model of transformers.*--dense hf/FOLDER"):
        export.hf(torch.nn.Linear(2, 2), (torch.ones(1, 2),), tmp_path / "p")
    model, inputs = llama()
    model.model.layers = model.model.layers[:1]
    with pytest.raises(ModelError, match="other widths, not other modules"):
        export.hf(model, (), tmp_path / "p", inputs)
    assert not list(tmp_path.iterdir())


def test_ratios_are_those_of_single_numbers():
    """Dimensions that are a number, or a number times one that they share (heads times their size): every solution gives all ratios, and the
    first changes no more numbers than those that the ratios were made from."""
    generator = random.Random(0)
    for _ in range(300):
        truth = {name: generator.choice([(1, 1), (1, 2), (3, 4)]) for name in "abcd"}
        groups = {frozenset(name + generator.choice(["", "d"])) for name in generator.choices("abc", k=4)}
        ratios = {group: lowest(truth, group) for group in groups}
        found = list(itertools.islice(solutions(ratios), 8))
        for trial in found:
            assert all(lowest({**dict.fromkeys("abcd", (1, 1)), **trial}, group) == ratio for group, ratio in ratios.items())
        counts = [sum(ratio != (1, 1) for ratio in trial.values()) for trial in found]
        assert counts[0] <= sum(ratio != (1, 1) for ratio in truth.values())


def lowest(ratios, group):
    from fractions import Fraction

    product = Fraction(1)
    for name in group:
        product *= Fraction(*ratios[name])
    return product.numerator, product.denominator
