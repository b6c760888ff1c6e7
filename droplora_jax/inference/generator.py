"""Decoding: prompts to completions, a batch at a time, with a cache of keys and values.

    generator = Generator(model, tokenizer)
    texts = generator(["Is 7 odd? "], Sampling(max_new_tokens=16))

Letters: `B` batch, `P` position of a prompt, `N` new token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from droplora_jax.core import distributed, prng
from droplora_jax.core.errors import InputError
from droplora_jax.core.files import read_json
from droplora_jax.core.sharding import RULES, axis_size, put
from droplora_jax.data.templates.base import Document, Piece, Tokenizer, shared_prefix
from droplora_jax.data.tokenization import encode_prompts
from droplora_jax.hf import source
from droplora_jax.inference.config import Sampling
from droplora_jax.inference.decode import Decoding, apart, better_apart, decode, prefill
from droplora_jax.models.config import ModelConfig
from droplora_jax.models.decoder import Decoder
from droplora_jax.nn.options import StepOptions
from droplora_jax.nn.rope import longest_static

CHUNK = 32  # steps between two looks at what was written
TAIL = 8  # last prompt tokens decoded with a completion, for its first characters to be right

Prompt = str | Sequence[int]


class Generator:
    """Completes prompts with a model, with or without adapters.

    >>> import droplora_jax as dl
    >>> from droplora_jax.commands.quickstart import BASE  # a small model in the package
    >>> opened = dl.open_model(str(BASE))
    >>> generator = dl.Generator(opened.model, opened.tokenizer)
    >>> len(generator(["Is 7 odd", "Spell cat"], dl.Sampling(max_new_tokens=2)))
    2
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        options: StepOptions = StepOptions(),
    ) -> None:
        """
        Args:
          batch_size: prompts at a time, rounded up to what the mesh splits evenly.
          options: `options.attention` is the kernel that reads the prompts.
        """
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: must be at least 1")
        self.config, self.mesh, self.tokenizer = model.config, model.mesh, tokenizer
        groups = axis_size(model.mesh, RULES["batch"] or ()) if model.mesh else 1
        self.batch_size = -(-batch_size // groups) * groups
        self.ends, self._options = ending_ids(model, tokenizer), options
        self._graphdef, self._state = nnx.split(apart(model) if better_apart(model) else model)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),
        *,
        rows: Sequence[int] | None = None,
    ) -> list[str]:
        """Completions of the prompts, in order, without stop strings and EOS.

        Args:
          prompts: texts, before which the tokenizer's own special tokens are put; or token ids,
            which are taken as they are.
          rows: an index for every prompt, which makes its random numbers; default: its place.

        Raises:
          InputError: a prompt that is empty, or too long for the model with what is to come.
        """
        done = dict(self.as_done(prompts, sampling, rows=rows))
        return [done[i] for i in range(len(prompts))]

    def as_done(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),
        *,
        rows: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, str]]:
        """The same one by one, each with the place of its prompt, the longest prompts first."""
        ids = self._encoded(prompts, sampling)
        rows = range(len(ids)) if rows is None else rows
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        for first in range(0, len(order), self.batch_size):
            places = order[first : first + self.batch_size]
            batch = self._complete([ids[i] for i in places], [rows[i] for i in places], sampling)
            *_, texts = batch
            yield from zip(places, texts, strict=True)

    def stream(self, prompt: Prompt, sampling: Sampling = Sampling()) -> Iterator[str]:
        """The completion of one prompt, piece by piece as it is written."""
        shown = ""
        text = ""
        for (text,) in self._complete(self._encoded([prompt], sampling), [0], sampling, chunk=1):
            ready = text[: _settled(text, sampling.stop)]
            if len(ready) > len(shown):
                yield ready[len(shown) :]
                shown = ready
        if len(text) > len(shown):
            yield text[len(shown) :]

    def room(self, prompts: Sequence[Prompt]) -> list[int]:
        """How many new tokens there is room for behind each prompt; negative if it is too long."""
        return [self.longest - len(ids) for ids in self._ids(prompts)]

    def _encoded(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[int]]:
        ids = self._ids(prompts)
        for i, own in enumerate(ids):
            self.check(f"prompt {i + 1}", own, sampling)
        return ids

    def _ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        texts = [Document((Piece(prompt, False),)) for prompt in prompts if isinstance(prompt, str)]
        of_texts = iter(encode_prompts(texts, self.tokenizer))
        return [next(of_texts) if isinstance(p, str) else list(p) for p in prompts]

    @property
    def longest(self) -> int:
        """How many tokens a row may have, prompt and completion together."""
        return longest(self.config)

    def check(self, where: str, ids: Sequence[int], sampling: Sampling) -> None:
        """Raise InputError for a prompt that can't be completed."""
        check_prompt(where, ids, sampling, self.config)

    def _complete(
        self,
        ids: Sequence[Sequence[int]],
        rows: Sequence[int],
        sampling: Sampling,
        chunk: int = CHUNK,
    ) -> Iterator[list[str]]:
        """The completions of one batch so far, every `chunk` steps, and at last whole."""
        added = self.tokenizer.get_added_vocab()
        ends = sorted(self.ends | {added[text] for text in sampling.stop if text in added})
        stopped_B = np.arange(self.batch_size) >= len(ids)
        decoding = self._prefill(ids, rows, stopped_B, ends, sampling)
        while True:
            count = int(decoding.count)
            tokens_BN = distributed.to_host(decoding.tokens_BN)[:, :count]
            done_B = distributed.to_host(decoding.done_B) | stopped_B
            texts = []
            for i, prompt in enumerate(ids):
                text = self._text(prompt, _until(tokens_BN[i].tolist(), ends))
                at = min((text.find(s) for s in sampling.stop if s in text), default=None)
                stopped_B[i] |= at is not None
                texts.append(text[:at])
            yield texts
            if (done_B | stopped_B).all() or count == sampling.max_new_tokens:
                return
            limit = min(count + chunk, sampling.max_new_tokens)
            decoding = decode(
                self._graphdef,
                self._state,
                decoding,
                put(stopped_B, ["batch"], self.mesh),
                np.asarray(ends, np.int32),
                np.int32(limit),
                sampling=sampling.distribution,
            )

    def _prefill(
        self,
        ids: Sequence[Sequence[int]],
        rows: Sequence[int],
        stopped_B: np.ndarray,
        ends: Sequence[int],
        sampling: Sampling,
    ) -> Decoding:
        length = bucket(max(map(len, ids)))
        tokens_BP = np.zeros((self.batch_size, length), np.int32)
        segment_ids_BP = np.zeros_like(tokens_BP)
        rows_B = np.zeros(self.batch_size, np.int32)
        for i, own in enumerate(ids):
            tokens_BP[i, length - len(own) :] = own
            segment_ids_BP[i, length - len(own) :] = 1
        rows_B[: len(rows)] = rows
        return prefill(
            self._graphdef,
            self._state,
            *put((tokens_BP, segment_ids_BP, rows_B, stopped_B), ["batch"], self.mesh),
            np.asarray(ends, np.int32),
            prng.run_keys(sampling.seed).generate,
            new=bucket(sampling.max_new_tokens),
            sampling=sampling.distribution,
            options=self._options,
        )

    def _text(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """What the new tokens add to the prompt's text; how it begins depends on what is there."""
        tail = list(prompt[-TAIL:])
        before, after = self._decoded(tail), self._decoded([*tail, *new])
        return after[shared_prefix(before, after) :]

    def _decoded(self, ids: list[int]) -> str:
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def longest(config: ModelConfig) -> int:
    """How many tokens a prompt and its completion may have together."""
    # Cached keys keep their rotation, so with `dynamic` scaling a row must not outgrow the range
    # in which the tables do not depend on its length.
    return longest_static(config.rope, config.max_positions)


def check_prompt(where: str, ids: Sequence[int], sampling: Sampling, config: ModelConfig) -> None:
    """Raise InputError for a prompt that a model of this shape can't complete.

    Args:
      where: what names the prompt in the error.
    """
    if not ids:
        raise InputError(f"{where}: is empty, and the tokenizer puts nothing before it")
    if max(ids) >= config.vocab_size:
        raise InputError(
            f"{where}: token id {max(ids)} is outside the model's vocabulary of "
            f"{config.vocab_size}: the tokenizer is another model's"
        )
    total = len(ids) + sampling.max_new_tokens
    if total > longest(config):
        why = (
            "the model is made for that many (max_position_embeddings)"
            if longest(config) == config.max_positions
            else f"beyond, rotary scaling {config.rope.kind!r} needs the row's whole length"
        )
        raise InputError(
            f"{where}: its {len(ids)} tokens and max_new_tokens={sampling.max_new_tokens} are "
            f"{total}, more than {longest(config)}: {why}; shorten it, or ask for fewer new tokens"
        )


def ending_ids(model: Decoder, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a completion.

    The tokenizer's EOS, and those that the folder of the weights names (`generation_config.json`,
    or `config.json`).
    """
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    if model.source is not None:
        folder = source.source_folder(model)
        for file in (folder / "generation_config.json", folder / "config.json"):
            given = _eos_of(read_json(file)) if file.exists() else set()
            ids |= given
            if given:
                break
    return frozenset(ids)


def _eos_of(config: Mapping[str, Any]) -> set[int]:
    given = config.get("eos_token_id")
    return set() if given is None else set(given) if isinstance(given, list) else {given}


def bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few shapes to compile, a third wasted at most."""
    power = 16
    while power < length:
        power *= 2
    between = power * 3 // 4
    return between if between >= max(length, 16) else power


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((n for n, token in enumerate(ids) if token in ends), len(ids))]


def _settled(text: str, stop: Sequence[str]) -> int:
    """The length of the prefix that later tokens cannot change.

    It excludes the beginning of a stop string, and a character whose bytes are not all generated.
    """
    text = text.rstrip("\ufffd")
    begun = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return len(text) - max(begun, default=0)
