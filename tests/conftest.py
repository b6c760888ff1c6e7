"""Eight simulated devices, run-time checked annotations, and small Hugging Face folders."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

# Before jax is imported. The flags are a default: a run on real accelerators may say otherwise.
# Most of the time goes into compiling small programs, so LLVM leaves them as they are.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest
import torch
from jaxtyping import install_import_hook

# Every annotation of the package is checked at every call, in tests only.
install_import_hook("droplora_jax", "oracles.checked")

from oracles import Folder, model_folder

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "droplora_jax" / "tests"

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what runs in its background with this ignored, and so would all that we start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # of what the package keeps
    config.addinivalue_line(
        "filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning"
    )
    torch.set_num_threads(1)
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])


@pytest.fixture(autouse=True, scope="module")
def compiled_programs():
    """Those of one file are of no use to the next, and there are thousands."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def strict():
    """No implicit dtype promotion: a stray float32 in a bfloat16 model is an error."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Untied embeddings, grouped-query heads, llama3 rotary scaling, several shards."""
    return model_folder(tmp_path_factory.mktemp("untied"), rope_parameters=LLAMA3)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """As `untied`, with tied embeddings."""
    folder = tmp_path_factory.mktemp("tied")
    return model_folder(folder, rope_parameters=LLAMA3, tie_word_embeddings=True)


@pytest.fixture(scope="session", params=["untied", "tied"])
def either(request: pytest.FixtureRequest) -> Folder:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """As `untied`, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("bfloat16")
    return model_folder(folder, rope_parameters=LLAMA3, dtype=torch.bfloat16)
