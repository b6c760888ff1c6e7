"""What other tools make of an adapter's folder, where it is not the function that was trained.

Each sentence is a fact of a version that was tried (transformers 5.24, PEFT 0.21: the tests of this
module try them again) or whose source was read (vLLM 0.33.0, llama.cpp's convert_lora_to_gguf.py at
0b03adaa).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from droplora_jax.hf.peft.config import ENDS, PeftFields
from droplora_jax.hf.peft.names import is_copy, split_key

# The families whose embedding and head vLLM adapts.
VLLM_ENDS = ("llama", "qwen3")
# The rank that it makes room for, and those that it can make room for.
VLLM_RANK = 16
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_limits(
    peft: PeftFields, keys: Collection[str] = (), family: str | None = None
) -> list[str]:
    """Why vLLM would not serve an adapter as it is; empty if it does.

    Args:
      keys: the names of its tensors.
      family: of its base, where it is known.
    """
    ends = adapted_ends(peft) if family not in VLLM_ENDS else []
    copies = [key for key in keys if _is_end(key) and not is_copy(key)]
    limits = {
        f"adapters of {' and '.join(ends)} (target_modules), which it adapts only in models of "
        f"{' and '.join(VLLM_ENDS)}": ends,
        "DoRA (use_dora)": peft.get("use_dora"),
        "modules trained whole (modules_to_save)": peft.get("modules_to_save"),
        "trained biases (bias)": peft.get("bias", "none") != "none",
        "copies of the embedding or the head": copies and not peft.get("modules_to_save"),
    }
    return [reason for reason, there in limits.items() if there]


def vllm_options(peft: PeftFields) -> str | None:
    """What vLLM has to be started with to serve an adapter that it does serve, in a sentence."""
    rank = max([peft["r"], *(peft.get("rank_pattern") or {}).values()])
    if rank <= VLLM_RANK:
        return None
    fitting = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if fitting is None:
        return f"vLLM serves ranks up to {VLLM_RANKS[-1]}: --rank K truncates this one"
    return f"vLLM serves it with --max-lora-rank {fitting} (its default is {VLLM_RANK})"


def llama_cpp_limits(peft: PeftFields, keys: Collection[str]) -> list[str]:
    """Why llama.cpp's converter of adapters would refuse one; empty if it does not.

    Args:
      keys: the names of its tensors.
    """
    whole = [key for key in keys if split_key(key)[1] is None and not is_copy(key)]
    limits = {
        "DoRA (use_dora)": peft.get("use_dora"),
        "trained biases (bias)": any(key.endswith(".bias") for key in whole),
        "embedding or head as they are": any(map(_is_end, whole)),
    }
    return [reason for reason, there in limits.items() if there]


def misreadings(
    peft: PeftFields, keys: Collection[str], *, tied: bool, rows: int | None = None
) -> Iterator[str]:
    """What tools get wrong with an adapter, besides what vLLM does not serve, in sentences.

    Args:
      keys: the names of its tensors.
      tied: the base's head is its embedding.
      rows: of the adapter's vocabulary, where the base has others.
    """
    merged = "--format merged is for every tool"
    if peft.get("use_dora"):
        yield (
            "transformers loads a DoRA adapter without its magnitudes, which its report calls "
            "missing (AutoModelForCausalLM.from_pretrained and load_adapter, 5.24): load it with "
            f"PEFT (PeftModel.from_pretrained), or {merged}"
        )
    if tied and adapted_ends(peft):
        yield (
            "PEFT computes it right as it is loaded, but its merge_and_unload adds the adapter of "
            f"one end to the table that both ends share (0.21): do not merge it there; {merged}"
        )
    if rows is not None:
        yield (
            f"PEFT needs a base of as many rows: model.resize_token_embeddings({rows}) before "
            f"PeftModel.from_pretrained, or {merged}"
        )
    if peft.get("rank_pattern") or peft.get("alpha_pattern"):
        yield (
            "vLLM serves ranks or alphas that differ (rank_pattern, alpha_pattern) in 0.33.0, but "
            "older versions take one of them for all layers, without a word: --rank K gives all "
            f"layers one, or {merged}"
        )
    if limits := llama_cpp_limits(peft, keys):
        yield f"llama.cpp's convert_lora_to_gguf refuses it: it has {', '.join(limits)}; {merged}"
    elif peft.get("use_rslora") or peft.get("alpha_pattern"):
        yield (
            "llama.cpp's convert_lora_to_gguf scales every layer by lora_alpha / rank, without a "
            "word, but this adapter has another scale (use_rslora, alpha_pattern): convert the "
            f"merged model; {merged}"
        )


def adapted_ends(peft: PeftFields) -> list[str]:
    """The embedding and the head, where they are among the targets."""
    targets = peft.get("target_modules") or ()
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    return [end for end in sorted(ENDS) if any(name.endswith(end) for name in names)]


def _is_end(key: str) -> bool:
    tensor, part = split_key(key)
    return part is None and any(tensor.endswith(f"{end}.weight") for end in ENDS)
