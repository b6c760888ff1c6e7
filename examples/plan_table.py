"""The README's table of plans: LLaMA shapes on TPU slices, one `droplora plan` each.

    python examples/plan_table.py            # all of it, one to four minutes a line
    python examples/plan_table.py 8B 70B@v5p # of one model, and of one on one kind of slice

Needs the TPU compiler (pip install '.[tpu]') and no TPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# width, feed-forward, heads, key/value heads, layers, head width: LLaMA 3.2 1B, and 3.1.
SHAPES = {
    "1B": (2048, 8192, 32, 8, 16, 64),
    "8B": (4096, 14336, 32, 8, 32, 128),
    "70B": (8192, 28672, 64, 8, 80, 128),
    "405B": (16384, 53248, 128, 8, 126, 128),
}
# Model, slice, rows of how many tokens a chip, further settings. The smallest slice, a usual one.
LINES = [
    ("1B", "v5e:1x1", 1, 2048, []),
    ("1B", "v5e:2x4", 1, 2048, []),
    ("1B", "v5p:2x2x1", 1, 4096, []),
    ("1B", "v6e:1x1", 1, 4096, []),
    ("8B", "v5e:2x2", 1, 2048, []),
    ("8B", "v5e:4x4", 1, 2048, []),
    ("8B", "v5p:2x2x1", 1, 4096, []),
    ("8B", "v6e:2x2", 1, 4096, []),
    ("8B", "v6e:4x4", 1, 4096, []),
    ("8B", "2xv5e:4x4", 1, 2048, ["mesh.replica=2"]),
    ("8B", "v5e:4x4", 1 / 16, 131072, ["mesh.fsdp=1", "mesh.context=16"]),
    ("70B", "v5e:8x8", 1, 2048, []),
    ("70B", "v5e:16x16", 1, 4096, []),
    ("70B", "v5p:2x2x2", 1, 4096, []),
    ("70B", "v5p:4x4x4", 1, 4096, []),
    ("70B", "v6e:4x4", 1, 4096, []),
    ("70B", "v6e:8x8", 1, 4096, []),
    ("405B", "v5e:16x16", 1, 2048, []),
    ("405B", "v5p:4x4x4", 1, 4096, []),
    ("405B", "v5p:4x4x8", 1, 4096, []),
    ("405B", "v6e:16x16", 1, 2048, []),
]
RUN = """
model: {path: MODEL}
output: none
adapter: {rank: 32, alpha: 64}
data: {train: none.jsonl, max_length: 2048}
train: {steps: 1000, global_batch: 1}
"""


def main(models: list[str]) -> None:
    print(
        "| model | slice | tokens a chip | GiB a chip | at most tokens/s a chip | bound by | sent |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, *line in LINES:
            if not models or any(f"{name}@{line[0]}".startswith(model) for model in models):
                print(row(Path(folder), name, *line), flush=True)


def row(folder: Path, name: str, where: str, rows: float, length: int, more: list[str]) -> str:
    write_config(folder, name)
    file = folder / "run.yaml"
    file.write_text(RUN.replace("MODEL", str(folder)))
    batch = round(rows * chips(where))
    settings = [f"data.max_length={length}", f"train.global_batch={batch}", *more]
    plan = [sys.executable, "-m", "droplora_jax.cli", "plan", str(file), *settings]
    done = subprocess.run(
        [*plan, "--topology", where, "--json"], capture_output=True, text=True, check=False
    )
    tokens = f"{length * batch // chips(where):,}"
    if done.returncode:
        raise SystemExit(done.stderr)
    return described(name, where, tokens, json.loads(done.stdout), more)


def described(name: str, where: str, tokens: str, plan: dict, more: list[str]) -> str:
    limit = plan["hbm_limit_bytes"] / 2**30
    size = f"{plan['hbm_bytes_per_chip'] / 2**30:.2f} of {limit:.0f}"
    mesh = f" ({', '.join(more)})" if more else ""
    start = f"| {name} | {where}{mesh} | {tokens} | {size}"
    if not plan["fits"]:
        change = plan["change"]
        fits = f"fits with {' '.join(change['overrides'])}" if change else "no change that fits"
        return f"{start}: **does not fit** | | | {fits} |"
    sent = ", ".join(
        f"{one['kind']} {one['bytes'] / 2**30:.1f} GiB ({one['axes']})"
        for one in plan["collectives"]
        if one["bytes"] >= 2**30 / 2
    )
    speed = plan["tokens_per_second"] / plan["devices"]
    return f"{start} | {speed:,.0f} | {plan['bound']} | {sent or 'less than 0.5 GiB'} |"


def write_config(folder: Path, name: str) -> None:
    width, ffn, heads, kv_heads, layers, head_dim = SHAPES[name]
    scaling = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "head_dim": head_dim,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": scaling
        | {"factor": 32.0 if name == "1B" else 8.0, "original_max_position_embeddings": 8192},
        "tie_word_embeddings": name == "1B",
    }
    (folder / "config.json").write_text(json.dumps(config))


def chips(where: str) -> int:
    """Of `2xv5e:4x4`: 32."""
    kind, shape = where.split(":")
    count = int(kind.split("x")[0]) if kind[0].isdigit() and "x" in kind else 1
    for size in shape.split("x"):
        count *= int(size)
    return count


if __name__ == "__main__":
    main(sys.argv[1:])
