"""`secateur mask` and `secateur verify`, as they are typed."""

import json
from pathlib import Path

import pytest
import torch

from secateur import cli

NETS = Path(__file__).parents[1] / "models" / "nets.py"
NET = f"{NETS}:net"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        assert cli.main([str(a) for a in arguments]) == code
        out, err = capsys.readouterr()
        return err if code else out

    return run


def test_masked_saved_and_verified(run, tmp_path):
    text = run("mask", NET, "--keep", "25%", "--data", "digits", "-o", tmp_path / "out")
    assert "weights of" in text and "stay (" in text and "single weights by alps" in text and "accuracy on the test rows" in text
    assert "times smaller)" in (said := run("verify", tmp_path / "out")) and "nothing is wrong" in said
    run("mask", NET, "--keep", "25%", "--entropy", "--input", "2x1x8x8", "-o", tmp_path / "small")
    assert "nothing is wrong" in run("verify", tmp_path / "small")
    found = json.loads(run("verify", tmp_path / "out", "--json"))
    assert found["problems"] == [] and found["zeros"] >= 0.74 * found["size"] > 0
    assert "parameters are zeroed" in text
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    (row,) = [row for row in facts["cost"] if row["figure"] == "nonzero"]
    assert row["pruned"] == row["dense"] - found["size"] + facts["settings"]["kept"] and 0 < row["share"] < 1
    assert facts["repairs"] and all(r["error_repaired"] <= r["error_cut"] or r["used"] == "plain" for r in facts["repairs"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "parameters that are not zeroed" in page and "of its parameters from being zero" in page


def test_without_data_the_largest_weights_stay(run):
    facts = json.loads(run("mask", NET, "--keep", "0.5", "--pattern", "free/row", "--input", "2x1x8x8", "--json"))
    assert facts["why"]["score"] == "magnitude" and facts["why"]["pattern"] == "free/row"
    assert facts["why"]["kept"] == sum(row["kept"] for row in facts["masks"])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--keep", "120%"], 2, "above 0 and below 100 %"),
        (["--pattern", "4:2"], 2, "0 < N < M"),
        (["--pattern", "2:4", "--keep", "30%"], 2, "which keeps 50 %"),
        ([], 2, "does not say how much stays"),
        (["--keep", "10%", "--by", "best", "--input", "1x1x8x8"], 2, "unknown method 'best'"),
        (["--keep", "10%", "--by", "alps", "--input", "1x1x8x8"], 2, "needs calibration data"),
        (["--keep", "10%", "--stream"], 2, "reads the shards of hf/FOLDER"),
        (["--keep", "10%", "--stream", "--weights", "w.safetensors"], 2, "--weights beside --stream"),
        (["--keep", "10%", "--stream", "--rows", "3"], 2, "--rows beside --stream"),
        (["--keep", "10%", "--stream", "--input", "1x3"], 2, "--input beside --stream"),
        (["--keep", "10%", "--stream", "--entropy"], 2, "an ordinary Hugging Face folder"),
    ],
)
def test_refused_in_words(run, arguments, code, said):
    assert said in run("mask", NET, *arguments, code=code)


def test_verify_says_what_is_wrong_and_fails(run, tmp_path):
    run("mask", NET, "--keep", "25%", "--input", "2x1x8x8", "-o", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert "was altered" in run("verify", tmp_path / "out", code=1)


def test_a_folder_of_hugging_face_is_streamed(run, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from safetensors.torch import save_file

    from secateur.models.hf import import_transformers

    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(config).eval()
    dense.save_pretrained(tmp_path / "dense", max_shard_size="10KB")
    ids = torch.randint(0, 40, (9, 24))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    command = ["mask", "hf/dense", "--pattern", "2:4", "--by", "alps", "--data", "safetensors:ids.safetensors", "--samples", "8", "--stream"]
    text = run(*command, "-o", "out")
    assert "14 layers stay (50.00 %)" in " ".join(text.split())
    assert "nothing is wrong" in run("verify", "out")
    sparse = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        apart = (sparse(ids).logits - dense(ids).logits).square().mean() / dense(ids).logits.var()
    assert 0 < apart < 0.2
    assert "is there already" in run(*command, "-o", "out", code=2)
    assert "holds no tokenizer" in run(*command[:6], "--data", f"text:{NETS}", "--stream", "-o", "other", code=1)
    save_file({"input_ids": ids + 20}, tmp_path / "ids.safetensors")
    assert "knows 40" in run(*command, "-o", "other", code=1)
    save_file({"input_ids": ids[0, :5]}, tmp_path / "ids.safetensors")
    assert "there are 5 tokens, and one window has 2048" in run(*command, "-o", "other", code=1)


def test_text_calibrates_a_model_in_memory(run, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    from secateur.models.hf import import_transformers
    from secateur.models.text import text_data

    transformers = import_transformers()
    words = [f"w{i}" for i in range(40)]
    splitting = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, "w0"))
    splitting.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=splitting, unk_token="w0")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    for one in (transformers.LlamaForCausalLM(config), tokenizer):
        one.save_pretrained(tmp_path / "dense")
    ids = torch.randint(1, 40, (1000,))
    (tmp_path / "corpus.txt").write_text(" ".join(words[i] for i in ids))

    data = text_data("text:corpus.txt", "hf/dense", samples=20, length=16, seed=3)
    rows = torch.cat([batch["input_ids"] for batch in data.train])
    windows = ids[: 1000 // 16 * 16].view(-1, 16)
    assert rows.shape == (20, 16) and all(any(torch.equal(r, w) for w in windows) for r in rows)
    assert not torch.equal(rows, torch.cat([b["input_ids"] for b in text_data("text:corpus.txt", "hf/dense", 20, 16, seed=4).train]))

    facts = json.loads(run("mask", "hf/dense", "--pattern", "2:4", "--by", "sparsegpt", "--data", "text:corpus.txt", "-o", "out", "--json"))
    assert facts["why"]["calibration_rows"] == 1000 // 32 // 4 * 4  # windows are no longer than the positions that the model knows
    assert 2 * facts["why"]["kept"] == facts["why"]["of_weights"]
    assert "nothing is wrong" in run("verify", "out")
    back = ("recover", "out", "--data", "text:corpus.txt", "--epochs", "2", "--json")
    facts = json.loads(run(*back, "--teacher", "hf/dense"))  # whose tokenizer it is, and whose outputs are learned
    assert facts["history"][-1]["loss"] < facts["history"][0]["loss"] and "nothing is wrong" in run("verify", "out-recovered")
    assert "needs the tokenizer of a model folder" in run(*back, "-o", "other", code=1)
    assert "needs the tokenizer of a model folder" in run("mask", NET, "--keep", "10%", "--data", "text:corpus.txt", code=1)
    (tmp_path / "corpus.txt").write_text("w1 w2")
    assert "there are 2 tokens" in run("mask", "hf/dense", "--pattern", "2:4", "--data", "text:corpus.txt", code=1)
    assert "a stream sees one block" in run("mask", "hf/dense", "--pattern", "2:4", "--permute", "--stream", "--data", "text:corpus.txt",
                                            "--length", "2", "-o", "o", code=2)  # fmt: skip


@pytest.mark.parametrize(("kind", "positions", "windows"), [("gpt2", {"n_positions": 24}, 24), ("roberta", {"max_position_embeddings": 26}, 24)])
def test_windows_are_as_long_as_the_model_can_take(run, tmp_path, kind, positions, windows):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from secateur.models import text
    from secateur.models.hf import import_transformers

    transformers = import_transformers()
    config = transformers.AutoConfig.for_model(kind, vocab_size=40, pad_token_id=1, bos_token_id=0, eos_token_id=2, **positions)
    config.save_pretrained(tmp_path / "dense")
    found, words = text._limits(tmp_path / "dense")
    assert (found, words) == (windows, 40)


def test_tokens_that_a_model_does_not_know_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from secateur.errors import DataError
    from secateur.models import text
    from secateur.models.hf import import_transformers

    import_transformers().LlamaConfig(vocab_size=40).save_pretrained(tmp_path)
    monkeypatch.setattr(text, "tokens_of", lambda path, folder: torch.arange(50))
    with pytest.raises(DataError, match=r"has token 49, and the model of .* knows 40"):
        text.text_data("text:corpus.txt", f"hf/{tmp_path}", length=8)
