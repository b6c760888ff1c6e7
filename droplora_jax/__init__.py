"""Fine-tune LLaMA-family models with DropLoRA in JAX.

    model = dl.load("path/or/hub-id", mesh=mesh)                # a Hugging Face folder, on the mesh
    model = dl.inject(model, dl.DropLoRA(rank=32), key=key)     # adapters on its linear layers
    graphdef, adapters, mask_keys, frozen = dl.split(model)     # differentiate `adapters` only
    model = dl.masked(model, step_key, rows=row_ids)            # masks on, for one step
    plain = dl.merge(model)                                     # adapters folded in
    dl.save_merged(model, out_dir)                              # Hugging Face's format, or PEFT's

The names in `__all__` and the namespaces `dl.tasks` and `dl.interop` are the public API; everything
else may change. The method itself is `lowrank.py`; `README.md` in this folder shows the way
through the rest. A name is imported when it is used for the first time, so that importing the
package takes no time.
"""

from etils import epy

__version__ = "0.1.0"

with epy.lazy_api_imports(globals()):
    from droplora_jax import inference as tasks
    from droplora_jax.adapters import interop
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
    from droplora_jax.inference.config import Sampling
    from droplora_jax.inference.generator import Generator
    from droplora_jax.nn.linear_spec import LinearSpec, linear_spec
    from droplora_jax.nn.options import Quantization
    from droplora_jax.runs.open_model import open_model

__all__ = [
    "DoRA",
    "DropLoRA",
    "Generator",
    "InputError",
    "Learned",
    "LinearSpec",
    "MeshConfig",
    "Quantization",
    "Sampling",
    "__version__",
    "combine",
    "draw",
    "inject",
    "interop",
    "linear_spec",
    "load",
    "load_adapter",
    "make_mesh",
    "masked",
    "merge",
    "open_model",
    "root_key",
    "save_adapter",
    "save_merged",
    "split",
    "tasks",
    "without_adapters",
]
