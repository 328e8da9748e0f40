"""A 1.5-billion-parameter language model with random weights, made 2:4 sparse from disk to disk: peak memory, kills, same bytes.

    python -m benchmarks.masks.large [--layers 28] [--folder build/large] [--kills 3]

The model (a Qwen2 configuration, bfloat16, about 3 GB) is written once. Then `secateur mask --stream` runs on it in processes of its
own: once to the end, and once killed at random moments and taken up again. `results/masks_large.json` says how much memory each took at
most, the seconds, and whether the two results are the same, file by file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.no_training.__main__ import versions

RESULTS = Path(__file__).parents[1] / "results" / "masks_large.json"
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "hidden_act": "silu",
}  # fmt: skip


def shapes(layers: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tensors of each shard."""
    d, f, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 256
    shards: dict[str, dict[str, tuple[int, ...]]] = {
        "embed.safetensors": {"model.embed_tokens.weight": (CONFIG["vocab_size"], d), "model.norm.weight": (d,)}
    }
    for i in range(layers):
        at = f"model.layers.{i}"
        shards[f"layer-{i:05d}.safetensors"] = {
            f"{at}.input_layernorm.weight": (d,), f"{at}.post_attention_layernorm.weight": (d,),
            f"{at}.self_attn.q_proj.weight": (d, d), f"{at}.self_attn.q_proj.bias": (d,), f"{at}.self_attn.k_proj.weight": (kv, d),
            f"{at}.self_attn.k_proj.bias": (kv,), f"{at}.self_attn.v_proj.weight": (kv, d), f"{at}.self_attn.v_proj.bias": (kv,),
            f"{at}.self_attn.o_proj.weight": (d, d), f"{at}.mlp.gate_proj.weight": (f, d), f"{at}.mlp.up_proj.weight": (f, d),
            f"{at}.mlp.down_proj.weight": (d, f),
        }  # fmt: skip
    return shards


def made(folder: Path, layers: int) -> Path:
    """The folder with the random model, written once."""
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator, where = torch.Generator().manual_seed(0), {}
    for file, tensors in shapes(layers).items():

        def values(name: str, shape: tuple[int, ...]) -> Tensor:
            if "norm" in name:
                return torch.ones(shape, dtype=torch.bfloat16)
            return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

        save_file({n: values(n, s) for n, s in tensors.items()}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    save_file({"input_ids": torch.randint(0, CONFIG["vocab_size"], (64, 256), generator=generator)}, folder.parent / "tokens.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def command(folder: Path, out: Path, samples: int) -> list[str]:
    return [sys.executable, "-m", "secateur", "mask", f"hf/{folder}", "--pattern", "2:4", "--by", "sparsegpt", "--no-refit", "--at-once", "--stream",
            "--data", f"safetensors:{folder.parent / 'tokens.safetensors'}", "--samples", str(samples), "-o", str(out)]  # fmt: skip


def watched(line: list[str], kill_after: float | None) -> tuple[int, float, int]:
    """Exit code, seconds and the most resident memory of one run; killed after so many seconds."""
    begin, most = time.perf_counter(), 0
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            most = max(most, 1024 * int(status.split("VmHWM:")[1].split()[0]))
        except (OSError, IndexError):
            pass
        if kill_after is not None and time.perf_counter() - begin > kill_after:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.2)
    return process.returncode, time.perf_counter() - begin, most


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/large"))
    parser.add_argument("--keep", action="store_true", help="leave the folders there")
    options = parser.parse_args()
    folder = made(options.folder / "dense", options.layers)
    for name in ("whole", "killed", ".whole.part", ".killed.part"):
        shutil.rmtree(options.folder / name, ignore_errors=True)
    code, seconds, most = watched(command(folder, options.folder / "whole", options.samples), None)
    print("whole:", code, f"{seconds:.0f} s", f"{most / 2**30:.2f} GiB", flush=True)
    random.seed(0)
    runs = []
    for _ in range(options.kills):
        runs.append(watched(command(folder, options.folder / "killed", options.samples), random.uniform(0.1, 0.3) * seconds))
        print("killed:", runs[-1], flush=True)
    runs.append(watched(command(folder, options.folder / "killed", options.samples), None))
    same = hashes(options.folder / "whole") == hashes(options.folder / "killed")
    verify = subprocess.run([sys.executable, "-m", "secateur", "verify", str(options.folder / "killed")], capture_output=True, text=True)
    found = {
        "parameters": sum(torch.tensor(s).prod().item() for t in shapes(options.layers).values() for s in t.values()), "layers": options.layers,
        "bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")), "samples": options.samples, "tokens_each": 256,
        "seconds": round(seconds, 1), "peak_bytes": most, "peak_bytes_of_killed": [m for _, _, m in runs], "exit_codes": [c for c, _, _ in runs],
        "seconds_of_killed": [round(s, 1) for _, s, _ in runs], "same_bytes": same, "verify": verify.stdout.strip().splitlines()[-1:],
        "threads": torch.get_num_threads(), "load_average": os.getloadavg(), "versions": versions(),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    if not options.keep:
        for name in ("whole", "killed"):
            shutil.rmtree(options.folder / name, ignore_errors=True)


if __name__ == "__main__":
    main()
