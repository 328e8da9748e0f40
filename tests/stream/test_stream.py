"""Block by block from the disk: the same as in memory, exact, resumable, and refused in words."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from secateur.errors import DataError, FormatError, InputError, ModelError, PlanError
from secateur.masks.methods import METHODS
from secateur.masks.problem import Problem
from secateur.pattern import NM, Block, Free, legal
from secateur.stream import Rule, Shards, Skeleton, Stream
from secateur.stream import run as run_module
from secateur.stream.verify import verify_stream
from tests.stream import nets

RULE = Rule(METHODS["sparsegpt"], Free(), Fraction(1, 2), refit=False)
QUIET = lambda stage: None  # noqa: E731


def stream(source, out, rule=RULE, at_once=False, feeds=None):
    return Stream(Skeleton(nets.Text, Shards.of(source)), nets.feeds() if feeds is None else feeds, rule, out, at_once, {})


def in_memory(model, feeds, rule, at_once):
    """The same, with the whole model and all values in memory: written down as plainly as can be."""
    causal, hidden = [], []
    for feed in feeds:
        n = feed["ids"].shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        causal.append([mask, mask & mask.T.logical_not().logical_or(torch.eye(n).bool()).tril()])
        hidden.append(model.embed(feed["ids"]) + model.table)
    for i, block in enumerate(model.layers):
        groups = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
        for lot in [[n for group in groups for n in group]] if at_once else groups:
            caught = {n: [] for n in lot}
            handles = [getattr(block, n).register_forward_pre_hook(lambda m, a, to=caught[n]: to.append(a[0].flatten(0, -2))) for n in lot]
            for x, masks in zip(hidden, causal, strict=True):
                block(x, masks[i % 2], scale=1.0 + i)
            for handle in handles:
                handle.remove()
            for n in lot:
                x = torch.cat(caught[n]).double()
                layer = getattr(block, n)
                found = rule.method.function(Problem(layer.weight.double(), x.T @ x / len(x), rule.pattern, rule.keep))
                layer.weight.copy_(found.w)
        hidden = [block(x, masks[i % 2], scale=1.0 + i) for x, masks in zip(hidden, causal, strict=True)]


@pytest.mark.parametrize("at_once", [False, True])
def test_block_by_block_is_what_the_whole_model_in_memory_gives(tmp_path, at_once):
    model = nets.made()
    done = stream(nets.folder(tmp_path / "dense", model), tmp_path / "out", at_once=at_once).run(QUIET)
    with torch.no_grad():
        in_memory(model, nets.feeds(), RULE, at_once)
    got = nets.loaded(tmp_path / "out").state_dict()
    for name, wanted in model.state_dict().items():
        assert torch.allclose(got[name], wanted, atol=2e-5), name
    assert done.depth == done.blocks == 3 and len(done.masks) == 21


@pytest.mark.parametrize("pattern", [Free(), NM(2, of=4), Block(4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_are_exact_and_everything_else_is_as_it_was(tmp_path, pattern, dtype):
    model = nets.made()
    rule = replace(RULE, pattern=pattern, refit=True)
    source = nets.folder(tmp_path / "dense", model, dtype)
    stream(source, tmp_path / "out", rule).run(QUIET)
    before, after = ({n: t for f in sorted(p.glob("*.safetensors")) for n, t in load_file(f).items()} for p in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, t in after.items():
        assert t.dtype == before[name].dtype
        linear = name.startswith("layers") and "norm" not in name and name.endswith("weight")
        if not linear:
            assert torch.equal(t, before[name])
            continue
        assert legal(pattern, t != 0) if not isinstance(pattern, Free) else int((t != 0).sum()) == t.numel() // 2
        assert not (torch.signbit(t) & (t == 0)).any()
    assert verify_stream(tmp_path / "out").problems == ()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert all((tmp_path / "out" / f).is_file() for f in index.values()) and index.keys() == before.keys()
    assert (tmp_path / "out" / "config.json").is_file() and not list(tmp_path.glob(".out*"))


def hashes(folder):
    return {f.name: run_module._sha256(f) for f in sorted(folder.iterdir())}


KILLED = """
import os, sys, signal
from pathlib import Path
from secateur.stream import run
from tests.stream.test_stream import stream
left, write = int(sys.argv[2]), run.write
def dying(path, tensors):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, tensors)
run.write = dying
stream(Path(sys.argv[1]) / "dense", Path(sys.argv[1]) / "out").run(lambda stage: None)
"""


def test_killed_at_any_moment_it_goes_on_and_gives_the_same_bytes(tmp_path):
    nets.folder(tmp_path / "dense", nets.made())
    stream(tmp_path / "dense", tmp_path / "whole").run(QUIET)
    there = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(there)}
    for writes in (3, 14, 9, 11):  # at the start, in the first block, in the second, in the third
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(writes)], cwd=there, env=environment, capture_output=True)
        assert done.returncode == -9, done.stderr[-500:]
        assert not (tmp_path / "out").exists()
    last = stream(tmp_path / "dense", tmp_path / "out").run(QUIET)
    assert last.blocks < 3 and len(last.masks) == 21
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_full_disk_keeps_what_was_done(tmp_path, monkeypatch):
    nets.folder(tmp_path / "dense", nets.made())
    stream(tmp_path / "dense", tmp_path / "whole").run(QUIET)
    plain = run_module.write

    def full(path, tensors):
        if path.name == "block-00001.safetensors":
            raise FormatError(f"{path} could not be written: no space left")
        plain(path, tensors)

    monkeypatch.setattr(run_module, "write", full)
    with pytest.raises(FormatError, match="no space left"):
        stream(tmp_path / "dense", tmp_path / "out").run(QUIET)
    monkeypatch.setattr(run_module, "write", plain)
    again = stream(tmp_path / "dense", tmp_path / "out").run(QUIET)
    assert again.blocks == 2 and hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_run_that_could_not_be_renamed_loses_nothing(tmp_path, monkeypatch):
    """Nor one that was killed before: what it goes on from is there until the folder has its name."""
    nets.folder(tmp_path / "dense", nets.made())
    stream(tmp_path / "dense", tmp_path / "whole").run(QUIET)
    monkeypatch.setattr(run_module.os, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(FormatError, match="is done and could not be renamed"):
        stream(tmp_path / "dense", tmp_path / "out").run(QUIET)
    monkeypatch.undo()
    again = stream(tmp_path / "dense", tmp_path / "out").run(QUIET)
    assert again.blocks == 0 and hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_an_index_may_not_name_files_elsewhere(tmp_path):
    source = nets.folder(tmp_path / "dense", nets.made())
    shard = next(source.glob("*.safetensors"))
    shard.rename(tmp_path / shard.name)
    with safe_open(tmp_path / shard.name, "pt") as held:
        names = list(held.keys())
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, f"../{shard.name}")}))
    with pytest.raises(ModelError, match="is not in the folder itself"):
        stream(source, tmp_path / "out")


def test_other_settings_do_not_go_on_with_a_run(tmp_path, monkeypatch):
    source = nets.folder(tmp_path / "dense", nets.made())
    monkeypatch.setattr(Stream, "_finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stream(source, tmp_path / "out").run(QUIET)
    with pytest.raises(InputError, match="other settings"):
        stream(source, tmp_path / "out", replace(RULE, keep=Fraction(1, 4))).run(QUIET)
    with pytest.raises(InputError, match="other settings"):
        stream(source, tmp_path / "out", feeds=nets.feeds(5)).run(QUIET)


class Experts(nets.Block):
    """Two experts in the place of the MLP, of which only the first ever runs; and a layer whose weight is used without it."""

    def __init__(self, d=16):
        super().__init__(d)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(d, d) for _ in range(2))
        self.bare = torch.nn.Linear(d, d)

    def forward(self, x, mask=None, *, scale=1.0):
        return torch.nn.functional.linear(x + self.experts[0](self.norm1(x)), self.bare.weight)


def text_of_experts():
    torch.manual_seed(0)
    model = nets.Text().eval()
    model.layers = torch.nn.ModuleList(Experts() for _ in range(2))
    return model


def test_experts_without_tokens_and_layers_that_never_run(tmp_path):
    model = text_of_experts()
    source = nets.folder(tmp_path / "dense", model)
    done = Stream(Skeleton(text_of_experts, Shards.of(source)), nets.feeds(), RULE, tmp_path / "out", False, {}).run(QUIET)
    got = {n: t for f in sorted((tmp_path / "out").glob("*.safetensors")) for n, t in load_file(f).items()}
    w, new = model.layers[1].experts[1].weight, got["layers.1.experts.1.weight"]
    assert int((new != 0).sum()) == w.numel() // 2 and w[new != 0].abs().min() >= w[new == 0].abs().max()
    assert torch.equal(got["layers.1.bare.weight"], model.layers[1].bare.weight)
    counts = {row.layer: row.rows for row in done.masks}
    assert counts["layers.0.experts.0"] == 120 and counts["layers.0.experts.1"] == 0
    assert any("no calibration token reached it" in note and "experts.1" in note for note in done.notes)
    assert {row.layer for row in done.masks if "never runs as a layer" in row.why} >= {"layers.0.bare", "layers.1.bare", "layers.1.q"}
    assert verify_stream(tmp_path / "out").problems == ()


# ------------------------------------------------------------ refused
def test_shards_that_are_missing_or_cut_short(tmp_path):
    source = nets.folder(tmp_path / "dense", nets.made())
    shard = source / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(ModelError, match="cut short"):
        stream(source, tmp_path / "out")
    shard.unlink()
    with pytest.raises(ModelError, match="is missing"):
        stream(source, tmp_path / "out")
    save_file({"layers.0.q.weight": torch.zeros(16, 16)}, shard)
    with pytest.raises(ModelError, match="lacks"):
        stream(source, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no model"):
        Shards.of(tmp_path / "empty")


def test_weights_that_do_not_fit_or_are_not_finite(tmp_path):
    model = nets.made()
    with torch.no_grad():
        model.layers[1].up.weight[2, 3] = float("nan")
    source = nets.folder(tmp_path / "dense", model)
    with pytest.raises(ModelError, match=r"layers\.1\.up\.weight in .* holds 1 values"):
        stream(source, tmp_path / "out").run(QUIET)
    with pytest.raises(ModelError, match="by its config"):
        Stream(Skeleton(lambda: nets.Text(words=9), Shards.of(source)), nets.feeds(), RULE, tmp_path / "other", False, {}).run(QUIET)
    with pytest.raises(ModelError, match="no list of blocks"):
        Skeleton(lambda: torch.nn.Linear(3, 3), Shards(source, {"weight": "x", "bias": "x"}))
    with pytest.raises(DataError, match="no sample"):
        stream(source, tmp_path / "third", feeds=[]).run(QUIET)


@pytest.mark.parametrize("what", ["weight", "minus", "pattern", "byte", "mark"])
def test_what_was_changed_afterwards_is_found(tmp_path, what):
    source = nets.folder(tmp_path / "dense", nets.made())
    out = tmp_path / "out"
    stream(source, out, replace(RULE, pattern=NM(2, of=4))).run(QUIET)
    file = out / "block-00001.safetensors"
    if what == "byte":
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 1
        file.write_bytes(raw)
        assert any("altered" in p for p in verify_stream(out).problems)
        return
    mark = json.loads((out / "secateur.json").read_text())
    if what == "mark":
        mark["method"] = "magic"
        (out / "secateur.json").write_text(json.dumps(mark))
        with pytest.raises(FormatError, match="altered"):
            verify_stream(out)
        return
    tensors = load_file(file)
    w = tensors["layers.1.q.weight"]
    zero = (w == 0).nonzero()[0].tolist()
    if what == "minus":
        w[tuple(zero)] = -0.0
    elif what == "weight":
        w[tuple(zero)] = 0.3
    else:  # as many zeros as before, one of them in another group
        other = next(c for c in range(16) if w[zero[0], c] != 0 and c // 4 != zero[1] // 4)
        w[zero[0], zero[1]], w[zero[0], other] = 0.3, 0.0
    save_file(tensors, file, metadata={"format": "pt"})
    mark["files"][file.name] = run_module._sha256(file)
    mark.pop("sha256")
    (out / "secateur.json").write_text(json.dumps({**mark, "sha256": run_module._digest(mark)}))
    said = {"minus": "are -0", "weight": "zeros", "pattern": "no legal pattern"}[what]
    assert any(said in p and "layers.1.q.weight" in p for p in verify_stream(out).problems)


def interrupted(source, out, monkeypatch, blocks=1):
    """A run that ends after so many blocks."""
    plain = Stream._block

    def block(self, index):
        if index == blocks:
            raise KeyboardInterrupt
        plain(self, index)

    monkeypatch.setattr(Stream, "_block", block)
    with pytest.raises(KeyboardInterrupt):
        stream(source, out).run(QUIET)
    monkeypatch.setattr(Stream, "_block", plain)
    return out.parent / f".{out.name}.part"


def test_a_run_whose_folder_or_source_was_changed_is_not_gone_on_with(tmp_path, monkeypatch):
    source = nets.folder(tmp_path / "dense", nets.made())
    work = interrupted(source, tmp_path / "out", monkeypatch)
    shard = work / "block-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(FormatError, match="was altered"):
        stream(source, tmp_path / "out").run(QUIET)
    shard.write_bytes(whole)
    hidden = next((work / "scratch").glob("hidden-1-*"))
    hidden.rename(hidden.with_suffix(".gone"))
    with pytest.raises(FormatError, match="was altered"):
        stream(source, tmp_path / "out").run(QUIET)
    hidden.with_suffix(".gone").rename(hidden)
    for text in ("", "{", "[]", "{}"):
        progress = (work / "progress.json").read_text()
        (work / "progress.json").write_text(text)
        with pytest.raises(FormatError, match="cannot be gone on with"):
            stream(source, tmp_path / "out").run(QUIET)
        (work / "progress.json").write_text(progress)
    held = run_module.alone(work)
    with pytest.raises(InputError, match="another run is at work"):
        stream(source, tmp_path / "out").run(QUIET)
    held.close()
    model = nets.made(seed=1)  # other values, of the same size
    for file in source.glob("*.safetensors"):
        save_file({n: model.state_dict()[n] for n in load_file(file)}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="other settings, data or weights"):
        stream(source, tmp_path / "out").run(QUIET)


def test_ignore_is_names_and_patterns_that_match(tmp_path):
    source = nets.folder(tmp_path / "dense", nets.made())
    done = stream(source, tmp_path / "out", replace(RULE, ignore=("layers.1", "*.down"))).run(QUIET)
    assert {r.layer for r in done.masks} == {f"layers.{i}.{n}" for i in (0, 2) for n in ("q", "k", "v", "o", "gate", "up")}
    with pytest.raises(InputError, match="matches no linear layer"):
        stream(source, tmp_path / "other", replace(RULE, ignore=("down",))).run(QUIET)
    with pytest.raises(PlanError, match="fits the pattern"):
        stream(source, tmp_path / "other", replace(RULE, pattern=Block(64, 1))).run(QUIET)


class Between(nets.Text):
    """Something happens between the blocks."""

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x) * 3
        return self.head(x)


class Shifted(nets.Block):
    """A buffer that is stored, a layer called by keyword, and one that is given a part of what another is given."""

    def __init__(self, d=16):
        super().__init__(d)
        self.register_buffer("shift", torch.zeros(d))

    def forward(self, x, mask=None, *, scale=1.0):
        h = self.norm1(x) + self.shift
        return x + self.q(input=h) + self.k(h[:, :1])


def text_of_shifted():
    model = nets.made()
    model.layers = torch.nn.ModuleList(Shifted() for _ in range(2))
    return model.eval()


def test_buffers_are_read_and_layers_are_grouped_by_what_they_are_given(tmp_path):
    model = text_of_shifted()
    for block in model.layers:
        block.shift.fill_(2.0)
    source = nets.folder(tmp_path / "dense", model)
    skeleton = Skeleton(text_of_shifted, Shards.of(source))
    done = Stream(skeleton, nets.feeds(), RULE, tmp_path / "out", False, {}).run(QUIET)
    assert {r.layer: r.rows for r in done.masks if r.layer in ("layers.0.q", "layers.0.k")} == {"layers.0.q": 120, "layers.0.k": 6}
    assert (skeleton.block(1).shift == 2).all()


def test_models_that_cannot_be_streamed_are_refused(tmp_path):
    source = nets.folder(tmp_path / "dense", nets.made())
    with pytest.raises(ModelError, match="between its blocks"):
        Stream(Skeleton(Between, Shards.of(source)), nets.feeds(), RULE, tmp_path / "out", False, {}).run(QUIET)
    file = source / json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][name := "layers.0.q.weight"]
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(ModelError, match="quantised"):
        stream(source, tmp_path / "out2").run(QUIET)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is there already"):
        stream(source, tmp_path / "link").run(QUIET)


def test_zeros_that_were_there_stay_in_a_second_run(tmp_path):
    source = nets.folder(tmp_path / "dense", nets.made())
    stream(source, tmp_path / "half").run(QUIET)
    stream(tmp_path / "half", tmp_path / "again", replace(RULE, pattern=NM(3, of=4), refit=True)).run(QUIET)  # has room for some of them
    first, second = (nets.loaded(tmp_path / n).state_dict() for n in ("half", "again"))
    for name, w in second.items():
        if name.endswith(("q.weight", "down.weight")):
            assert not (w[first[name] == 0] != 0).any() and bool(w.any()) and not torch.equal(w, first[name])


def test_a_stored_buffer_of_another_shape_is_refused(tmp_path):
    source = nets.folder(tmp_path / "dense", text_of_shifted())
    file = source / json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][name := "layers.0.shift"]
    save_file({**load_file(file), name: torch.ones(1)}, file)
    with pytest.raises(ModelError, match=r"layers\.0\.shift is \(1,\)"):
        Stream(Skeleton(text_of_shifted, Shards.of(source)), nets.feeds(), RULE, tmp_path / "out", False, {}).run(QUIET)


def test_an_error_that_is_kept_does_not_keep_the_folder_locked(tmp_path, monkeypatch):
    source = nets.folder(tmp_path / "dense", nets.made())
    held = stream(source, tmp_path / "out")  # as a notebook holds it
    monkeypatch.setattr(run_module, "block_calls", lambda *_: (_ for _ in ()).throw(ModelError("once")))
    with pytest.raises(ModelError, match="once"):
        held.run(QUIET)
    monkeypatch.undo()
    assert stream(source, tmp_path / "out").run(QUIET).blocks == 3


@pytest.mark.parametrize("kind", ["bloom", "gpt_neo", "falcon", "codegen"])
def test_models_that_take_a_tuple_from_their_blocks_are_streamed(tmp_path, kind):
    """With moments of the dense block at once and no refit, the first block is what the layers give that are solved by themselves."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from secateur.models.hf import import_transformers
    from secateur.sparsify import Sparse
    from secateur.stream.hf import mask_folder

    transformers = import_transformers()
    small = {"bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2}, "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
             "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
             "codegen": {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4}}[kind]  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=40, bos_token_id=0, eos_token_id=1, **small)
    dense = transformers.AutoModelForCausalLM.from_config(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    ids = torch.randint(0, 40, (40, 12))
    mask_folder(tmp_path / "dense", tmp_path / "out", Sparse(None, "sparsegpt", NM(2, of=4)), ids)
    sparse = type(dense).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        wanted, found = dense(ids).logits, sparse(ids).logits
        for p, q in zip(dense.parameters(), sparse.parameters(), strict=True):  # the same mask without a fit
            p.mul_(q != 0) if (q == 0).float().mean() > 0.4 else None
        plain = dense(ids).logits
    assert (found - wanted).square().mean() < 0.8 * (plain - wanted).square().mean()


def test_embeddings_that_are_stored_in_half_precision_are_as_good_as_copied(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from secateur.models.hf import import_transformers
    from secateur.sparsify import Sparse
    from secateur.stream.hf import mask_folder

    transformers = import_transformers()
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)  # adds two embeddings
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    shutil.copytree(tmp_path / "half", tmp_path / "full")
    held = load_file(tmp_path / "half" / "model.safetensors")
    save_file({n: t.float() for n, t in held.items()}, tmp_path / "full" / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(0, 40, (30, 12))
    for name in ("half", "full"):
        mask_folder(tmp_path / name, tmp_path / f"{name}-out", Sparse(None, "sparsegpt", NM(2, of=4)), ids, at_once=True)
    half, full = ({n: t for f in sorted((tmp_path / f"{n}-out").glob("*.safetensors")) for n, t in load_file(f).items()} for n in ("half", "full"))
    assert all(torch.equal(half[n], full[n].to(torch.bfloat16)) for n in half)
