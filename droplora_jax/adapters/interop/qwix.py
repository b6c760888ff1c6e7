"""Qwix's LoRA with dropped ranks (the extra `tunix`): its rules and factors, this project's masks.

    provider = DropLoraProvider(module_path=".*(q|k|v|up|down)_proj", rank=32, alpha=64.0)
    model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **inputs)
    model = dl.masked(model, step_key, rows=rows)    # masks on, for one step

Off is how a model is made, and how it is evaluated. Layers in lists are meant, not stacked ones;
the mask of a layer is the one that an adapter of `dl.inject` would have at its path.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from droplora_jax import lowrank
from droplora_jax.adapters.droplora import DropLoRA
from droplora_jax.core import prng
from droplora_jax.core.errors import InputError
from droplora_jax.core.mask_options import Granularity, Sampler
from droplora_jax.nn.linear_spec import LinearSpec
from droplora_jax.nn.mask_keys import MaskKey, checked_rows

try:
    from qwix._src.core.einsum_info import EinsumInfo
    from qwix._src.providers import lora, ptq
    from qwix._src.utils import flax_util
except ImportError as error:
    raise ImportError('Qwix is needed here: pip install "droplora-jax[tunix]"') from error


@dataclass(frozen=True, kw_only=True)
class DropLoraRule(lora.LoraRule):
    """Qwix's rule, and how the ranks are dropped: the options of `DropLoRA`.

    Raises:
      InputError: an impossible option; input dropout, which Qwix can't turn off in evaluation.
    """

    drop_rate: float = 0.5
    granularity: Granularity = "token"
    sampler: Sampler = "bernoulli"
    rescale: bool = True

    def __post_init__(self) -> None:
        DropLoRA(  # only for its checks
            rank=self.rank, alpha=self.alpha, drop_rate=self.drop_rate, sampler=self.sampler
        )
        if self.dropout:
            raise InputError(f"dropout={self.dropout} would stay on in evaluation: leave it at 0")


class DropLoraProvider(lora.LoraProvider):
    """Qwix's provider for rules of both kinds: `DropLoraRule`s, and its own `LoraRule`s."""

    def __init__(self, rules: Any = None, *, disable_jit: bool = False, **kwargs: Any) -> None:
        """Take rules, or the options of a single `DropLoraRule`."""
        if rules is None:
            rules, kwargs = [DropLoraRule(**kwargs)], {}
        super().__init__(rules, disable_jit=disable_jit, **kwargs)

    def dot_general(
        self, lhs: Array, rhs: Any, dimension_numbers: Any, *args: Any, **kwargs: Any
    ) -> Array:
        rule = self._dropping("dot_general")
        if rule is None:
            return super().dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)
        y = self._base().dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)
        spec = _spec_of_dot(dimension_numbers, lhs.ndim, len(rhs.shape))
        return _with_branch(y, rule, lhs, rhs, spec, flat=True)

    def einsum(self, equation: str, *operands: Any, **kwargs: Any) -> Array:
        rule = self._dropping("einsum")
        if rule is None or len(operands) != 2:
            return super().einsum(equation, *operands, **kwargs)
        y = self._base().einsum(equation, *operands, **kwargs)
        lhs, rhs = operands
        info = EinsumInfo.parse(equation, ndims=(len(lhs.shape), len(rhs.shape)))
        return _with_branch(y, rule, lhs, rhs, LinearSpec(info.lhs, info.rhs, info.out), flat=False)

    def _dropping(self, op: str) -> DropLoraRule | None:
        rule, _ = self._get_current_rule_and_op_id(op, only_rule=True)
        return rule if isinstance(rule, DropLoraRule) else None

    def _base(self) -> Any:
        """What the layer computes without a branch, quantised or not."""
        return super(lora.LoraProvider, self)


def _spec_of_dot(dimension_numbers: Any, lhs_ndim: int, rhs_ndim: int) -> LinearSpec:
    """A product of `jax.lax.dot_general` in einsum letters."""
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dimension_numbers
    lhs = string.ascii_lowercase[:lhs_ndim]
    rhs = list(string.ascii_uppercase[:rhs_ndim])
    for i, j in zip((*lhs_contracted, *lhs_batch), (*rhs_contracted, *rhs_batch), strict=True):
        rhs[j] = lhs[i]
    free = [c for c in [*lhs, *rhs] if (c in lhs) != (c in rhs)]
    return LinearSpec(lhs, "".join(rhs), "".join([*(lhs[i] for i in lhs_batch), *free]))


def _with_branch(
    y: Array, rule: DropLoraRule, x: Array, kernel: Any, spec: LinearSpec, *, flat: bool
) -> Array:
    """`y = x @ W`, and the branch if W is a parameter of the module that is being called.

    `flat`: the factors are two matrices, as Qwix has them for `dot_general`.
    """
    name = flax_util.find_param(kernel, ptq.WithAux)
    if name is None:
        return y
    module = flax_util.get_current_module()
    _check(module, spec)
    a, b = _factors(rule, name, kernel.shape, spec, flat=flat)
    (h,) = lowrank.compress(x.astype(y.dtype), a, down=spec.down)
    mask = _mask(rule, _mask_keys(module, rule, name), h)
    h = h if mask is None else h * mask
    return y + lowrank.lowrank_delta(h, b, scale=rule.alpha / rule.rank, up=spec.up)


def _check(module: Any, spec: LinearSpec) -> None:
    if not isinstance(module, nnx.Module):
        raise InputError("ranks are dropped in nnx models; for linen see droplora_jax.linen")
    if spec.batched or spec.inputs[0] in spec.contracted:
        raise InputError(
            f"{spec.inputs},{spec.kernel}->{spec.outputs}: the rows of the batch have to be the "
            "input's first axis and no axis of the kernel; leave the layer to a LoraRule"
        )


def _factors(
    rule: DropLoraRule, name: str, shape: tuple[int, ...], spec: LinearSpec, *, flat: bool
) -> tuple[Array, Array]:
    """A [*in, R] and B [R, *out] of the current module, made by Qwix when they are not there."""
    axes_in, axes_out = (
        [spec.kernel.index(c) for c in letters] for letters in (spec.contracted, spec.produced)
    )
    sizes_in, sizes_out = ([shape[i] for i in axes] for axes in (axes_in, axes_out))
    stored_in, stored_out = sizes_in, sizes_out
    if flat:
        stored_in, stored_out = [math.prod(sizes_in)], [math.prod(sizes_out)]
    a, b = lora._get_or_create_lora_params(
        name=name,
        rule=rule,
        a_shape=(*stored_in, rule.rank),
        b_shape=(rule.rank, *stored_out),
        a_sharding_transpose=(*axes_in[: len(stored_in)], None),
        b_sharding_transpose=(None, *axes_out[: len(stored_out)]),
    )
    return a.reshape(*sizes_in, rule.rank), b.reshape(rule.rank, *sizes_out)


def _mask_keys(module: Any, rule: DropLoraRule, name: str) -> Array:
    """The keys of a kernel's mask, none at first; `dl.draw` fills them, by their name."""
    first = getattr(module, "mask_key", None)
    is_first = first is None or first.get_metadata("kernel") == name
    attribute = "mask_key" if is_first else f"{name}_mask_key"
    if not hasattr(module, attribute):
        granularity = rule.granularity if rule.drop_rate > 0 else None
        keys = jnp.broadcast_to(prng.root_key(0), (0,))
        mask_key = MaskKey(keys, stack=(), granularity=granularity, kernel=name)
        setattr(module, attribute, mask_key)
    return getattr(module, attribute)[...]


def _mask(rule: DropLoraRule, keys: Array, h: Array) -> Array | None:
    if keys.size == 0:
        return None
    return lowrank.rank_mask(
        keys if rule.granularity == "step" else checked_rows(keys, h),
        h.shape,
        drop_rate=rule.drop_rate,
        granularity=rule.granularity,
        sampler=rule.sampler,
        rescale=rule.rescale,
        dtype=h.dtype,
    )
