"""Load and export a model of full size: peak memory and time, against the machine's own limits.

    python examples/benchmarks/loading.py               # 3.2 billion parameters in bfloat16
    python examples/benchmarks/loading.py --layers 2    # a quick look

Writes a folder with random weights of the shape of LLaMA-3.2-3B, reads it once so that it is in the
page cache, and measures each part in a process of its own. Time is compared with reading the same
bytes plus the fastest transposition of them that NumPy, JAX and PyTorch have; memory is the peak of
the process over what it had before, less what the loaded arrays take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from work import Shape
from workers import memory

GIB = 2**30
SHAPE = Shape(128_256, 3072, 8192, 28, 24, 8, rope_theta=5e5, max_position_embeddings=131_072)
SHARD = 63  # tensors: of seven layers


def write_folder(folder: Path, layers: int) -> None:
    """Random weights under the names and in the shapes of the model, a shard for a few layers."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    shape = replace(SHAPE, num_hidden_layers=layers)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape.hf}
    config |= {"tie_word_embeddings": True, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {name: size for name, size in shape.tensors().items() if name != "lm_head.weight"}
    groups = [list(shapes)[i : i + SHARD] for i in range(0, len(shapes), SHARD)]
    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {
            name: (rng.standard_normal(shapes[name], np.float32) * 0.02).astype(ml_dtypes.bfloat16)
            for name in group
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def reading(folder: Path) -> dict[str, float]:
    """Seconds to read the folder's bytes, and to transpose them in the fastest way."""
    import jax
    import ml_dtypes
    import numpy as np
    import torch

    buffer = bytearray(2**26)
    for _ in range(2):  # the first time fills the page cache
        begin, size = time.perf_counter(), 0
        for file in folder.glob("*.safetensors"):
            with file.open("rb", buffering=0) as opened:
                while count := opened.readinto(buffer):
                    size += count
        read = time.perf_counter() - begin
    x = np.random.default_rng(0).integers(0, 2**14, (8192, 3072)).astype(np.uint16)
    out, of_jax = np.empty(x.shape[::-1], x.dtype), jax.device_put(x.view(ml_dtypes.bfloat16))
    of_torch = torch.from_numpy(x.view(np.int16))
    torch_out = torch.from_numpy(out.view(np.int16))
    turn = jax.jit(lambda x: x.T)
    ways = {
        "NumPy": lambda: np.copyto(out, x.T),
        "JAX": lambda: turn(of_jax).block_until_ready(),
        "PyTorch": lambda: torch_out.copy_(of_torch.T),
    }
    seconds = {}
    for way, run in ways.items():
        run()
        begin = time.perf_counter()
        for _ in range(8):
            run()
        seconds[way] = (time.perf_counter() - begin) / 8 * size / x.nbytes
    fastest = min(seconds, key=seconds.__getitem__)
    return {"read": read, "transpose": seconds[fastest], "fastest": fastest, "bytes": size}


def loading(folder: Path) -> dict[str, float]:
    """Seconds to load the folder, and the peak over what the arrays take."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import droplora_jax as dl

    mesh = dl.make_mesh()  # starts JAX
    before = memory()["now"]
    begin = time.perf_counter()
    model = jax.block_until_ready(nnx.state(dl.load(folder, mesh=mesh, dtype=jnp.bfloat16)))
    seconds = time.perf_counter() - begin
    arrays = sum(x.nbytes for x in jax.tree.leaves(model))
    return {"seconds": seconds, "arrays": arrays, "over": memory()["peak"] - before - arrays}


def exporting(folder: Path) -> dict[str, float]:
    """Seconds to write and verify the merged folder, and the peak over what was there before."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import droplora_jax as dl
    from droplora_jax.hf.base import Base

    mesh = dl.make_mesh(devices=jax.devices()[:1])
    base = Base.open(folder).abstract(mesh, dtype=jnp.bfloat16)
    model = dl.inject(base, dl.DropLoRA(rank=16, alpha=32), key=dl.root_key(0))
    for _, module in nnx.iter_graph(model):
        if hasattr(module, "lora_b"):
            b = module.lora_b
            module.lora_b = b.replace(0.01 * jax.random.normal(dl.root_key(1), b.shape))
    before = memory()["now"]
    begin = time.perf_counter()
    report = dl.save_merged(model, folder.with_name("merged"))
    print(report, file=sys.stderr)
    return {"seconds": time.perf_counter() - begin, "over": memory()["peak"] - before}


PARTS = {"reading": reading, "loading": loading, "exporting": exporting}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.folder / "base")))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        write_folder(Path(work) / "base", options.layers)
        seen = {}
        for part in PARTS:
            command = [sys.executable, __file__, "--part", part, "--folder", work]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            seen[part] = json.loads(out.splitlines()[-1])
    limits, load, export = (seen[part] for part in PARTS)
    floor = limits["read"] + limits["transpose"]
    allowed = max(0.1 * limits["bytes"], GIB)
    rows = [
        ("model, GiB", limits["bytes"] / GIB, f"{options.layers} layers"),
        ("read from the page cache, s", limits["read"], ""),
        ("fastest transposition, s", limits["transpose"], limits["fastest"]),
        ("load, s", load["seconds"], f"{load['seconds'] / floor:.2f} of the two above"),
        ("load, peak over arrays, GiB", load["over"] / GIB, f"of {allowed / GIB:.2f} allowed"),
        ("merged export and its checks, s", export["seconds"], ""),
        ("export, peak over before, GiB", export["over"] / GIB, ""),
    ]
    for name, value, note in rows:
        print(f"{name:34} {value:8.2f}  {note}")


if __name__ == "__main__":
    main()
