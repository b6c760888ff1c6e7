"""Make the small base model that `droplora quickstart` fine-tunes: plain language modelling.

    python examples/quickstart/make_base.py OUTPUT_DIR [--steps 4000]

It reads statements about made-up words and numbers ("lamp backwards is pmal.") and has never seen
a question. The folder that ships with the package was made by this script.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from droplora_jax.commands.quickstart_run import random_number, random_word
from droplora_jax.core.files import write_json
from droplora_jax.models.decoder import Decoder
from droplora_jax.models.families import FAMILIES
from droplora_jax.models.parameter_table import tensor_names
from droplora_jax.nn.options import StepOptions
from droplora_jax.training.step import loss_sum

LENGTH, ROWS = 64, 32
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "dtype": "float32",
}


def statement(rng: random.Random) -> str:
    word, number = random_word(rng), random_number(rng)
    facts = (
        f"{word} begins with {word[0]}.",
        f"{word} ends with {word[-1]}.",
        f"{word} backwards is {word[::-1]}.",
        f"{word} in capitals is {word.upper()}.",
        f"{number} is {'odd' if number % 2 else 'even'}.",
    )
    return rng.choice(facts) + "\n"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def read_lines(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> dict[str, np.ndarray]:
    """A batch [ROWS, LENGTH] of statements one after the other."""
    rows = []
    for _ in range(ROWS):
        text = ""
        while len(text) <= LENGTH:
            text += statement(rng)
        rows.append(tokenizer(text).input_ids[: LENGTH + 1])
    ids = np.asarray(rows, np.int32)
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": np.ones_like(ids[:, 1:]),
    }


def pretrain(model: Decoder, tokenizer: PreTrainedTokenizerFast, steps: int) -> Decoder:
    graphdef, params = nnx.split(model)
    options = StepOptions(remat="everything")
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 10, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        def loss(params):
            total, count = loss_sum(nnx.merge(graphdef, params), batch, options=options)
            return total / count

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, rng = tx.init(params), random.Random(0)
    for n in range(steps):
        params, opt_state, loss = step(params, opt_state, read_lines(tokenizer, rng))
        if n % 100 == 99:
            print(f"step {n + 1}/{steps}  loss {float(loss):.4f}", flush=True)
    return nnx.merge(graphdef, params)


def save(model: Decoder, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tensors, names = {}, tensor_names(model.config)
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        name = names[".".join(map(str, path))]
        stacked = np.asarray(parameter[...])
        for layer, value in enumerate(stacked if name.stacked else stacked[None]):
            tensor = value.T if name.transposed else value
            tensors[name.of_layer(layer)] = np.ascontiguousarray(tensor)
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", {**CONFIG, "vocab_size": len(tokenizer)})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    options = parser.parse_args()
    tokenizer = make_tokenizer()
    config = FAMILIES["llama"].model_config({**CONFIG, "vocab_size": len(tokenizer)})
    model = Decoder(config, rngs=nnx.Rngs(0))
    save(pretrain(model, tokenizer, options.steps), tokenizer, options.output)


if __name__ == "__main__":
    main()
