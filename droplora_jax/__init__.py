"""Fine-tune LLaMA-family models with DropLoRA in JAX.

    model = dl.load("path/or/hub-id", mesh=mesh)                # hub.py: a folder onto the mesh
    model = dl.inject(model, dl.DropLoRA(rank=32), key=key)     # surgery.py, adapters/
    graphdef, adapters, mask_keys, frozen = dl.split(model)     # differentiate `adapters` only
    model = dl.masked(model, step_key, rows=row_ids)            # masks on, for one step
    plain = dl.merge(model)                                     # adapters folded in
    dl.save_merged(model, out_dir)                              # export/: Hugging Face, PEFT

The method itself is `lowrank.py`. Above the pure functions (`ops`, `attention`, `loss`, `rope`,
`prng`, `sharding`) stand the model (`models/`), the data (`data/`), the step (`step.py`),
checkpoints (`checkpoint.py`), the loop (`train.py`), a run's configuration (`run.py`) and the
command line (`cli.py`).
"""

from droplora_jax.adapters.combine import combine
from droplora_jax.adapters.dora import DoRA
from droplora_jax.adapters.droplora import DropLoRA
from droplora_jax.adapters.learned import Learned
from droplora_jax.adapters.surgery import draw, inject, masked, merge, split, without_adapters
from droplora_jax.core.config import MeshConfig
from droplora_jax.core.errors import InputError
from droplora_jax.core.prng import root_key
from droplora_jax.core.sharding import make_mesh
from droplora_jax.hf.load import load
from droplora_jax.hf.merged import save_merged
from droplora_jax.hf.peft.adapter import load_adapter, save_adapter
from droplora_jax.models.decoder import with_noise
from droplora_jax.nn.linear_spec import LinearSpec, linear_spec
from droplora_jax.nn.mask_keys import MaskKey
from droplora_jax.nn.options import Quantization

__all__ = [
    "DoRA",
    "DropLoRA",
    "InputError",
    "Learned",
    "LinearSpec",
    "MaskKey",
    "MeshConfig",
    "Quantization",
    "combine",
    "draw",
    "inject",
    "linear_spec",
    "load",
    "load_adapter",
    "make_mesh",
    "masked",
    "merge",
    "root_key",
    "save_adapter",
    "save_merged",
    "split",
    "with_noise",
    "without_adapters",
]
