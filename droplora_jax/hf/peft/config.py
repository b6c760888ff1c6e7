"""What `adapter_config.json` says, read as PEFT reads it, and written for PEFT to read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from droplora_jax.adapters.config import Branch, LowRank, scale_of
from droplora_jax.core.errors import InputError

PeftFields = Mapping[str, Any]  # of an `adapter_config.json`
Number = TypeVar("Number", int, float)

PEFT_FILE = "adapter_config.json"

# Fields that are read, or that do not change what a loaded adapter computes.
READ = frozenset(
    {
        "alpha_pattern",
        "ensure_weight_tying",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
    }
)
HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# A field that is not listed must say that its option is off, or have one of these values.
ACCEPTED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", "all", "lora_only"),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
OFF: tuple[object, ...] = (None, False, [], {})
ENDS = frozenset({"embed_tokens", "lm_head"})  # of a model, which may be tied
REQUIRED = ("lora_alpha", "peft_type", "r")


def check_fields(peft: PeftFields, file: Path) -> None:
    """Raise InputError for a field that is missing, of a wrong kind, or can't be represented."""
    for field in REQUIRED:
        if field not in peft:
            raise InputError(f"{file}: lacks the field {field!r}")
    for field, value in peft.items():
        accepted = ACCEPTED.get(field, OFF)
        if (field in ACCEPTED or field not in READ | HARMLESS) and value not in accepted:
            raise InputError(
                f"{file}: {field}={value!r} can't be represented; understood: "
                f"{', '.join(map(repr, accepted))}"
            )
    positive: dict[str, tuple[Any, tuple[type, ...]]] = {
        "r": (peft["r"], (int,)),
        "lora_alpha": (peft["lora_alpha"], (int, float)),
        **{f"rank_pattern.{k}": (v, (int,)) for k, v in (peft.get("rank_pattern") or {}).items()},
        **{
            f"alpha_pattern.{k}": (v, (int, float))
            for k, v in (peft.get("alpha_pattern") or {}).items()
        },
    }
    for field, (value, kinds) in positive.items():
        if type(value) not in kinds or not value > 0:
            raise InputError(f"{file}: {field}={value!r}: must be a positive number")


def branch_of(peft: PeftFields, module: str) -> Branch:
    """Rank, alpha and scale of one module, by its full name."""
    rank = _by_pattern(peft.get("rank_pattern"), module, peft["r"])
    alpha = float(_by_pattern(peft.get("alpha_pattern"), module, peft["lora_alpha"]))
    return Branch(rank, alpha, scale_of(rank, alpha, bool(peft.get("use_rslora"))))


def _by_pattern(patterns: Mapping[str, Number] | None, module: str, default: Number) -> Number:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def is_target(peft: PeftFields, module: str) -> bool:
    """Whether PEFT would adapt a module of this full name."""
    if _named(peft.get("exclude_modules"), module):
        return False
    targets = peft.get("target_modules")
    if targets is None or targets == "all-linear":
        return True
    if not _named(targets, module):
        return False
    layers = peft.get("layers_to_transform")
    if isinstance(targets, str) or module in targets or layers in (None, []):
        return True
    patterns = peft.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(found.group(1)) in ([layers] if isinstance(layers, int) else layers)
    return False


def _named(names: str | Sequence[str] | None, module: str) -> bool:
    """By a regular expression, or by a list of names or of their ends."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def peft_config(
    config: LowRank,
    branches: Mapping[str, Branch],
    default: Branch,
    whole: Mapping[str, Collection[str]],
    *,
    base: str,
    revision: str | None,
    tied: bool,
) -> dict[str, Any]:
    """The file for adapters on these modules.

    Args:
      branches: of every module of the base that could have one, by its full name; rank 0: none.
      default: the branch of modules without a pattern.
      whole: `bias` and `modules_to_save`, as PEFT has them.
      base, revision: where the base model is, and the commit of a hub id.
      tied: the base's head is its embedding.
    """
    adapted = {module: branch for module, branch in branches.items() if branch.rank}
    ends = {module.rsplit(".", 1)[-1] for module in adapted}
    there = ENDS & ends
    everywhere = all(module in adapted for module in branches if module.rsplit(".", 1)[-1] in ends)
    # The adapter of a head that is the embedding has the embedding's rank, by a pattern of its own.
    embedding = [branch for module, branch in adapted.items() if module.endswith("embed_tokens")]
    tied_head = {"lm_head": embedding[0]} if tied and embedding else {}
    everything = adapted | tied_head
    ranks = {m: branch.rank for m, branch in everything.items() if branch.rank != default.rank}
    alphas = {m: _number(b.alpha) for m, b in everything.items() if b.alpha != default.alpha}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": default.rank,
        "lora_alpha": _number(default.alpha),
        "target_modules": sorted(ends if everywhere else adapted),
        "rank_pattern": {re.escape(module): rank for module, rank in ranks.items()},
        "alpha_pattern": {re.escape(module): alpha for module, alpha in alphas.items()},
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": config.rank_stabilized,
        "use_dora": config.kind == "dora",
        "inference_mode": True,
        "init_lora_weights": True,
        **whole,
        **({"ensure_weight_tying": True} if tied and (whole["modules_to_save"] or there) else {}),
    }


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
