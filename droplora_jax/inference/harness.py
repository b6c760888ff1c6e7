"""Our models for lm-evaluation-harness, whose own tasks then run on them (the extra `harness`).

    import lm_eval
    from droplora_jax.inference.harness import HarnessModel

    opened = open_model("path/of/a/model")
    lm_eval.simple_evaluate(HarnessModel(opened.model, opened.tokenizer), tasks=["piqa"])

Letters: `B` batch, `T` position, `C` positions of a block, `V` vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from droplora_jax.core.distributed import to_host
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import put
from droplora_jax.data.templates.base import Document, Piece, Tokenizer
from droplora_jax.data.tokenization import encode_prompts
from droplora_jax.inference.config import Sampling
from droplora_jax.inference.generator import Generator, bucket
from droplora_jax.models.decoder import Decoder
from droplora_jax.nn.options import StepOptions

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        'lm-evaluation-harness is needed here: pip install "droplora-jax[harness]"'
    ) from error

BLOCK = 128  # positions whose logits are there at once
NEW_TOKENS = 256  # where a task does not say

Scored = tuple[float, bool]
T = TypeVar("T")


class HarnessModel(TemplateLM):
    """A model as lm-evaluation-harness asks it: log-likelihoods, and completions."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, *, batch_size: int = 8) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = model.config.max_positions
        self.generator = Generator(model, tokenizer, batch_size=batch_size)
        self.batch_size = self.generator.batch_size
        self._mesh = model.mesh
        self._graphdef, self._state = nnx.split(model)

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no EOS token, which the harness needs")
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)  # as `tokenize=False` gives it

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Token ids; by default with what the tokenizer puts before a text, and nothing behind."""
        if add_special_tokens is False:
            return self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        return encode_prompts([Document((Piece(string, False),))], self.tokenizer)[0]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The token ids of both, as the harness cuts them, but never none.

        A token may span the end of the context and all of the continuation, which then has no
        token of its own: it is encoded alone.
        """
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:
            moved = context[len(context.rstrip()) :]  # spaces, which the harness moves
            continuation_ids = self.tok_encode(moved + continuation, add_special_tokens=False)
        return context_ids or [self.prefix_token_id], continuation_ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **kwargs: object
    ) -> list[Scored]:
        for texts, _, continuation in requests:
            if not continuation:
                raise InputError(
                    f"the continuation of {texts!r:.200} has no tokens, so that it has no "
                    "log-likelihood to compare (it would be 0, probability 1)"
                )
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise InputError(
                f"a continuation of {longest} tokens: the model is made for {self.max_length}"
            )
        scored = self._in_batches(requests, lambda r: len(r[1]) + len(r[2]), self._score)
        for (texts, _, _), result in zip(requests, scored, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any], **kwargs: object) -> list[float]:
        """The log-likelihood of whole texts; a text too long for the model is scored in windows."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(value for value, _ in self._loglikelihood_tokens(pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            totals.append(total)
        return totals

    def generate_until(self, requests: Sequence[Any], **kwargs: object) -> list[str]:
        groups: defaultdict[Sampling, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[_sampling(request.args[1])].append(i)
        completions = [""] * len(requests)
        for sampling, places in groups.items():
            room = self.generator.longest - sampling.max_new_tokens
            if room < 1:
                raise InputError(
                    f"the task asks for {sampling.max_new_tokens} new tokens, and the model is "
                    f"made for {self.generator.longest} in all (gen_kwargs: max_gen_toks)"
                )
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in places]
            for i, text in zip(places, self.generator(prompts, sampling), strict=True):
                completions[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return completions

    def _in_batches(
        self,
        items: Sequence[T],
        length: Callable[[T], int],
        work: Callable[[Sequence[T]], list[Scored]],
    ) -> list[Scored]:
        """`work` on items of like length together; the results in order."""
        order = sorted(range(len(items)), key=lambda i: -length(items[i]))
        done: dict[int, Scored] = {}
        for first in range(0, len(order), self.batch_size):
            places = order[first : first + self.batch_size]
            done.update(zip(places, work([items[i] for i in places]), strict=True))
        return [done[i] for i in range(len(items))]

    def _score(self, batch: Sequence[tuple[object, list[int], list[int]]]) -> list[Scored]:
        """The continuations' log-likelihoods, and whether greedy decoding would give them."""
        rows = [
            (context + continuation)[-self.max_length - 1 :] for _, context, continuation in batch
        ]
        shape = self.batch_size, bucket(max(len(row) - 1 for row in rows))
        tokens_BT, targets_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        segment_ids_BT, scored_BT = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for i, (row, (_, _, continuation)) in enumerate(zip(rows, batch, strict=True)):
            last = len(row) - 1
            tokens_BT[i, :last], targets_BT[i, :last] = row[:-1], row[1:]
            segment_ids_BT[i, :last] = 1
            scored_BT[i, max(last - len(continuation), 0) : last] = True
        arrays = put((tokens_BT, segment_ids_BT, targets_BT, scored_BT), ["batch"], self._mesh)
        found = continuation_scores(self._graphdef, self._state, *arrays)
        values_B, greedy_B = (to_host(array) for array in found)
        return [(float(values_B[i]), bool(greedy_B[i])) for i in range(len(batch))]


@partial(jax.jit, static_argnames="graphdef")
def continuation_scores(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    targets_BT: Int[Array, "B T"],
    scored_BT: Bool[Array, "B T"],
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """Per row: the summed log-probability of the scored targets; whether each is the argmax.

    The logits are made for `BLOCK` positions at a time.
    """
    model = nnx.merge(graphdef, state)
    x_BTD = model.hidden(tokens_BT, segment_ids=segment_ids_BT, options=StepOptions(packed=False))

    def of_block(block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x_BCD, targets_BC, scored_BC = block
        logits_BCV = model.logits(x_BCD).astype(jnp.float32)
        own_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        values_BC = own_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
        likeliest_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
        return (
            jnp.sum(values_BC, axis=1, where=scored_BC),
            jnp.all(likeliest_BC | ~scored_BC, axis=1),
        )

    blocks = [_blocks(array) for array in (x_BTD, targets_BT, scored_BT)]
    values, greedy = jax.lax.map(of_block, tuple(blocks))
    return jnp.sum(values, axis=0), jnp.all(greedy, axis=0)


def _blocks(x: Array) -> Array:
    """[B, T, ...] to [blocks, B, BLOCK, ...], filled up with zeros at the end."""
    missing = -x.shape[1] % BLOCK if x.shape[1] > BLOCK else 0
    x = jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])
    x = x.reshape(x.shape[0], -1, min(x.shape[1], BLOCK), *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def _sampling(given: Mapping[str, Any]) -> Sampling:
    """How the harness asks for a completion, as we do."""
    asked = dict(normalize_gen_kwargs(dict(given), NEW_TOKENS))
    sampled = asked.pop("do_sample", False)
    temperature = float(asked.pop("temperature", 1.0 if sampled else 0.0))
    filters = {key: asked.pop(key) for key in ("top_k", "top_p") if key in asked}
    sampling = Sampling(
        max_new_tokens=asked.pop("max_gen_toks"),
        temperature=temperature,
        stop=tuple(text for text in asked.pop("until") if text),
        seed=asked.pop("seed", 0),
        **(filters if temperature > 0 else {}),
    )
    if asked:
        raise InputError(f"gen_kwargs {', '.join(asked)}: not supported here")
    return sampling
