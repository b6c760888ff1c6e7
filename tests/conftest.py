"""Eight simulated devices, run-time checked annotations, and small Hugging Face folders."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

# Before jax is imported. The flags are a default: a run on real accelerators may say otherwise.
# Most of the time goes into compiling small programs, so LLVM leaves them as they are.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiled programs are kept from one session to the next. The workers of xdist and the processes
# that tests start inherit the folder, and so share them.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "droplora_jax" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest
import torch
from jaxtyping import install_import_hook

# Every annotation of the package is checked at every call, in tests only.
install_import_hook("droplora_jax", "oracles.checked")

from oracles import Folder, model_folder

if TYPE_CHECKING:
    from run_fixtures import CommandLine

pytest_plugins = ["programs", "pytester"]

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


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A tiny model with a tokenizer, to train. No test changes its files."""
    from run_fixtures import make_base

    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def base(base_folder: Folder) -> Path:
    """The path of `base_folder`."""
    return base_folder.path


@pytest.fixture
def droplora(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line, run in this process."""
    from run_fixtures import CommandLine

    return CommandLine(capsys)
