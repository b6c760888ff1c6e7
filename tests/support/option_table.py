"""Runs that together give every key of a run's YAML every value that it may have.

Keys are dotted to the section; paths are relative to the folder that `write_files` fills.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
from data_fixtures import CHATML, make_tokenizer, write_json, write_jsonl
from oracles import with_config
from run_fixtures import make_base

from droplora_jax.inference.tasks.commonsense import COMMONSENSE

# What a run says unless its row says otherwise; `...` takes a key out.
COMMON: dict[str, Any] = {
    "model.path": "base",
    "data.train": "data/prompt_completion.jsonl",
    "data.max_length": 24,
    "optim.warmup_steps": 0,
    "train.steps": 3,
    "train.global_batch": 8,
    "train.log_every": 1,
    "adapter.rank": 4,
    "adapter.targets": ["q_proj"],
    "mesh.data": -1,
    "mesh.fsdp": 1,
}

WITHOUT_DECAY = {"optim.weight_decay": 0.0}

RUNS: dict[str, dict[str, Any]] = {
    # DropLoRA.
    "smallest-counts": {
        "adapter.rank": 1,
        "adapter.alpha": 0.5,
        "adapter.drop_rate": 0.0,
        "data.train": "data/text.jsonl",
        "data.valid": "data/short.jsonl",
        "data.format": "text",
        "data.max_length": 2,
        "distributed.timeout": 10,
        "mesh.data": 1,
        "mesh.tensor": 8,
        "model.dtype": "float32",
        "train.eval_every": 1,
        "train.global_batch": 1,
        "train.keep": 1,
        "train.micro_batch": 1,
        "train.save_every": 1,
        "train.steps": 1,
        "train.stop_seconds": 1,
    },
    "droplora-odd-rank": {
        "adapter.kind": "droplora",
        "adapter.rank": 3,
        "adapter.init": "gaussian",
        "adapter.granularity": "sequence",
        "adapter.sampler": "exact",
        "adapter.rescale": False,
        "adapter.targets": "all-linear",
        "adapter.exclude": ["o_proj"],
        "data.train": "data/alpaca.jsonl",
        "data.format": "alpaca",
        "data.template": "alpaca",
        "data.packing": "first_fit",
        "data.max_length": 109,
        "optim.name": "lion",
        "optim.schedule": "cosine",
        "optim.warmup_steps": 1,
        "model.dtype": "bfloat16",
        "mesh.data": 1,
        "mesh.fsdp": -1,
    },
    "droplora-patterns": {
        "adapter.rank_pattern": {"q_proj": 2, "layers.1.up_proj": 6},
        "adapter.alpha_pattern": {"v_proj": 2.0, "q_proj": 0.5},
        "adapter.drop_rate_pattern": {"up_proj": 0.0, "layers.0.q_proj": 0.25},
        "adapter.init": "orthogonal",
        "adapter.targets": "paper",
        "adapter.rank": 2,
        "adapter.rank_stabilized": True,
        "data.columns": {"prompt": "q", "completion": "a"},
        "data.train": "data/renamed.jsonl",
        "data.packing": "best_fit",
        "optim.name": "sgd",
        "optim.options": {"momentum": 0.9, "nesterov": True},
        "optim.clip_norm": None,
        "train.remat": "everything",
        **WITHOUT_DECAY,
    },
    "droplora-step-exact-scheduled": {
        "adapter.granularity": "step",
        "adapter.sampler": "exact",
        "adapter.drop_schedule": "linear",
        "adapter.drop_warmup_steps": 1,
        "adapter.init": "pissa",
        "data.train": "data/question_answer.jsonl",
        "data.format": "question_answer",
        "data.template": "alpaca_steps",
        "data.max_length": 96,
        "data.train_on": "all",
        "optim.name": "adafactor",
        "train.epochs": 1.5,
        "train.steps": ...,
        "train.micro_batch": 8,
        "mesh.tensor": 2,
        "mesh.fsdp": 4,
        "mesh.data": 1,
        **WITHOUT_DECAY,
    },
    "droplora-cosine-milora": {
        "adapter.drop_schedule": "cosine",
        "adapter.drop_warmup_steps": 2,
        "adapter.init": "milora",
        "adapter.input_dropout": 0.1,
        "data.packing": True,
        "data.valid": [
            "data/prompt_completion.jsonl",
            {"path": "data/renamed.jsonl", "columns": {"prompt": "q", "completion": "a"}},
        ],
        "optim.name": "yogi",
        "optim.b_ratio": 16.0,
        "mesh.context": 2,
        "mesh.fsdp": 2,
        "mesh.data": 2,
        "train.eval_every": 2,
        "train.best": "loss",
        **WITHOUT_DECAY,
    },
    "droplora-olora-quantized": {
        "adapter.init": "olora",
        "adapter.targets": ["q_proj", "gate_proj"],
        "model.quantize": "int8",
        "model.quantize_tile": 16,
        "model.quantize_pattern": {
            "down_proj": "none",
            "up_proj": "nf4",
            "q_proj": "int4",
            "v_proj": "int8",
        },
        "data.valid_fraction": 0.25,
        "optim.name": "adamax",
        "train.remat": "dots",
        "mesh.replica": 2,
        **WITHOUT_DECAY,
    },
    "droplora-from-peft": {
        "model.adapter": "adapter",
        "adapter.rank": ...,
        "adapter.targets": ...,
        "model.ignore_config_keys": ["written_by"],
        "model.path": "noted",
        "model.revision": "main",
        "data.train": "data/sharegpt.json",
        "data.format": "sharegpt",
        "data.max_length": 40,
        "optim.name": "rmsprop",
        "optim.options": {"centered": False},
        "train.remat": "attention",
        "seed": 2**32 - 1,
        **WITHOUT_DECAY,
    },
    "droplora-ends-trained": {
        "model.add_tokens": ["<|more|>"],
        "adapter.train_whole": ["norm", "lm_head"],
        "adapter.targets": ["embed", "q_proj", "v_proj"],
        "data.train": "data/wrapped.jsonl",
        "data.format": "wrapped",
        "data.max_length": 100,
        "optim.name": "adamw",
        "optim.no_decay": ["norm", "lora_b$"],
        "optim.options": {"b2": 0.95, "mu_dtype": "bfloat16"},
        "train.neftune_alpha": 5.0,
        "mesh.data": 1,
        "mesh.fsdp": 4,
        "mesh.tensor": -1,
    },
    "droplora-tasks": {
        "data.train": "data/messages.jsonl",
        "data.format": "messages",
        "data.template": "chat",
        "data.train_on": "last",
        "data.max_length": 70,
        "train.eval_tasks": {task.name: "data/choices.jsonl" for task in COMMONSENSE},
        "train.eval_examples": 1,
        "train.eval_every": 3,
        "train.best": "boolq",
        "optim.name": "adagrad",
        **WITHOUT_DECAY,
    },
    "droplora-code-tasks": {
        "data.train": "data/prompt_messages.jsonl",
        "data.format": "prompt_messages",
        "data.max_length": 40,
        "data.bad_rows": "drop",
        "data.ignore_keys": ["images"],
        "train.eval_tasks": {
            name: f"data/{name}.jsonl" for name in ("gsm8k", "math", "humaneval", "mbpp")
        },
        "train.eval_examples": 1,
        "train.eval_run_code": True,
        "optim.name": "adadelta",
        "optim.schedule": "constant",
    },
    # DoRA.
    "dora-smallest": {
        "adapter.kind": "dora",
        "adapter.rank": 1,
        "adapter.targets": "paper",
        "adapter.drop_rate": 0.0,
        "data.too_long": "error",
        "data.empty": "error",
        "data.template": "none",
        "optim.name": "lars",
        "model.quantize": "nf4",
        "model.quantize_tile": 2,
        "mesh.context": -1,
        "mesh.data": 4,
        "train.log_every": 2,
    },
    "dora-gaussian": {
        "adapter.kind": "dora",
        "adapter.rank": 3,
        "adapter.init": "gaussian",
        "adapter.granularity": "sequence",
        "adapter.sampler": "exact",
        "adapter.drop_schedule": "linear",
        "adapter.rescale": False,
        "data.cache": "cache",
        "data.too_long": "drop",
        "data.packing": "best_fit",
        "optim.name": "lamb",
    },
    "dora-orthogonal": {
        "adapter.kind": "dora",
        "adapter.init": "orthogonal",
        "adapter.granularity": "step",
        "adapter.drop_schedule": "cosine",
        "adapter.drop_warmup_steps": 1,
        "adapter.rank_stabilized": True,
        "adapter.train_whole": ["lm_head"],
        "data.train": [
            {"path": "data/prompt_completion.jsonl", "weight": 1.0, "format": "prompt_completion"},
            {"path": "data/question_answer.jsonl", "weight": 3.0, "template": "none"},
        ],
        "optim.name": "novograd",
        "train.remat": "auto",
        "train.profile_steps": [1, 1],
    },
    "dora-pissa": {
        "adapter.kind": "dora",
        "adapter.init": "pissa",
        "adapter.alpha": 3.0,
        "adapter.targets": ["q_proj", "v_proj"],
        "adapter.rank_pattern": {"q_proj": 1, "v_proj": 2},
        "adapter.alpha_pattern": {"v_proj": 2.0, "q_proj": 0.5},
        "adapter.drop_rate_pattern": {"q_proj": 0.25, "v_proj": 0.0},
        "adapter.drop_warmup_steps": 2,
        "data.train": ["data/prompt_completion.jsonl", "data/more.jsonl"],
        "optim.name": "radam",
        "mesh.data": 1,
        "mesh.replica": -1,
        **WITHOUT_DECAY,
    },
    "dora-milora": {
        "adapter.kind": "dora",
        "adapter.init": "milora",
        "adapter.targets": "all-linear",
        "model.attention": "blockwise",
        "model.quantize": "int4",
        "model.quantize_tile": 8,
        "optim.name": "signum",
        **WITHOUT_DECAY,
    },
    "dora-olora": {
        "adapter.kind": "dora",
        "adapter.init": "olora",
        "adapter.targets": ["q_proj", "lm_head"],
        "adapter.exclude": ["layers.0.q_proj"],
        "adapter.input_dropout": 0.5,
        "data.format": "prompt_completion",
        "optim.name": "adamw",
    },
    # Learned masks.
    "learned-smallest": {
        "adapter.kind": "learned",
        "adapter.rank": 1,
        "optim.name": "adam",
        **WITHOUT_DECAY,
    },
    "learned-gaussian": {
        "adapter.kind": "learned",
        "adapter.rank": 3,
        "adapter.init": "gaussian",
        "adapter.input_dropout": 0.2,
        "data.packing": True,
        "optim.name": "adan",
    },
    "learned-orthogonal": {
        "adapter.kind": "learned",
        "adapter.init": "orthogonal",
        "adapter.alpha": 1.0,
        "adapter.targets": ["q_proj", "v_proj"],
        "adapter.rank_pattern": {"q_proj": 2, "v_proj": 6},
        "adapter.alpha_pattern": {"v_proj": 2.0, "q_proj": 0.5},
        "adapter.train_whole": ["norm"],
        "optim.name": "adabelief",
        **WITHOUT_DECAY,
    },
    "learned-pissa": {
        "adapter.kind": "learned",
        "adapter.init": "pissa",
        "adapter.rank_stabilized": True,
        "adapter.targets": "all-linear",
        "optim.name": "adamaxw",
    },
    "learned-milora": {
        "adapter.kind": "learned",
        "adapter.init": "milora",
        "adapter.targets": "paper",
        "adapter.exclude": ["layers.0", "down_proj"],
        "optim.name": "fromage",
        **WITHOUT_DECAY,
    },
    "learned-olora": {
        "adapter.kind": "learned",
        "adapter.init": "olora",
        "adapter.targets": ["q_proj"],
        "optim.name": "sign_sgd",
        **WITHOUT_DECAY,
    },
    # The optimizers that no run above has.
    "amsgrad": {"mesh.data": 2, "mesh.fsdp": -1, "optim.name": "amsgrad", **WITHOUT_DECAY},
    "optimistic-adam": {"optim.name": "optimistic_adam_v2", **WITHOUT_DECAY},
    "optimistic-gradient-descent": {
        "optim.name": "optimistic_gradient_descent",
        "optim.learning_rate": 0.1,
        **WITHOUT_DECAY,
    },
}

# What can't be trained on a CPU, without a network, alone, or with a schedule: why, the key that
# the refusal names, and whether it can be planned all the same.
REFUSED: dict[str, tuple[dict[str, Any], str, bool]] = {
    "splash is a kernel for TPUs": ({"model.attention": "splash"}, "model.attention", False),
    "tokamax is a kernel for GPUs": ({"model.attention": "tokamax"}, "model.attention", False),
    "cudnn is a kernel for GPUs": ({"model.attention": "cudnn"}, "model.attention", False),
    "a CPU has nothing to offload": ({"train.remat": "offload"}, "train.remat", False),
    "a tile has to divide a layer's inputs": (
        {"model.quantize": "int8", "model.quantize_tile": 6},
        "model.quantize_tile=6",
        False,
    ),
    "a hub id needs the network": ({"model.path": "nobody/nothing"}, "model.path", False),
    "the others need an address": (
        {"distributed.num_processes": 2, "distributed.process_id": 1},
        "distributed.coordinator",
        False,
    ),
    "processes are joined before JAX starts": (
        {
            "distributed.coordinator": "127.0.0.1:1",
            "distributed.num_processes": 1,
            "distributed.process_id": 0,
        },
        "distributed.coordinator",
        True,
    ),
    "rows to evaluate are not mixed": (
        {"data.valid": [{"path": "data/more.jsonl", "weight": 1.0}]},
        "data.valid",
        False,
    ),
    "only a judge scores mt_bench": (
        {"train.eval_tasks": {"mt_bench": "data/choices.jsonl"}},
        "train.eval_tasks.mt_bench",
        True,
    ),
    "lbfgs searches along a line": ({"optim.name": "lbfgs", **WITHOUT_DECAY}, "optim.name", False),
    "the first optimistic_adam takes no schedule": (
        {"optim.name": "optimistic_adam", **WITHOUT_DECAY},
        "optim.name",
        False,
    ),
    "noisy_sgd keeps a random key": (
        {"optim.name": "noisy_sgd", **WITHOUT_DECAY},
        "optim.name",
        False,
    ),
    "rprop takes no schedule": ({"optim.name": "rprop", **WITHOUT_DECAY}, "optim.name", False),
    "sm3 takes no schedule": ({"optim.name": "sm3", **WITHOUT_DECAY}, "optim.name", False),
}


def write_files(folder: Path) -> None:
    """Two bases, an adapter of PEFT's, and a file of every format."""
    base = make_base(folder / "base", max_position_embeddings=1200)
    make_tokenizer(chat_template=CHATML).save_pretrained(base.path)
    with_config(base.path, folder / "noted", written_by="a trainer")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    peft.get_peft_model(base.torch, config).save_pretrained(folder / "adapter")
    data = folder / "data"
    data.mkdir()
    numbers = range(16)
    write_jsonl(
        data / "prompt_completion.jsonl",
        [{"prompt": f"{n}?", "completion": f"is {n}"} for n in numbers],
    )
    write_jsonl(
        data / "more.jsonl", [{"prompt": f"{n}!", "completion": f"was {n}"} for n in numbers]
    )
    write_jsonl(data / "renamed.jsonl", [{"q": f"{n}?", "a": f"is {n}"} for n in numbers])
    write_jsonl(
        data / "question_answer.jsonl",
        [{"question": f"{n}?", "answer": f"is {n}"} for n in numbers],
    )
    write_jsonl(
        data / "alpaca.jsonl",
        [{"instruction": f"{n}?", "input": "now", "output": f"is {n}"} for n in numbers],
    )
    wrapped = "Below is an instruction that describes a task. Say {}."
    write_jsonl(
        data / "wrapped.jsonl",
        [{"instruction": wrapped.format(n), "output": f"{n}"} for n in numbers],
    )
    write_jsonl(data / "text.jsonl", [{"text": f"the answer is {n}"} for n in numbers])
    write_jsonl(data / "short.jsonl", [{"text": "0 1"}])
    turns = [
        [("user", f"{n}?"), ("assistant", f"is {n}"), ("user", "so?"), ("assistant", "yes")]
        for n in numbers
    ]
    write_jsonl(
        data / "messages.jsonl",
        [{"messages": [{"role": r, "content": c} for r, c in each]} for each in turns],
    )
    write_jsonl(
        data / "prompt_messages.jsonl",
        [
            *(
                {
                    "prompt": [{"role": "user", "content": f"{n}?"}],
                    "completion": [{"role": "assistant", "content": f"is {n}"}],
                    "images": ["0.png"],
                }
                for n in numbers
            ),
            {"prompt": "a text", "completion": "among lists"},
        ],
    )
    write_json(
        data / "sharegpt.json",
        [{"conversations": [{"from": r, "value": c} for r, c in each[:2]]} for each in turns],
    )
    write_jsonl(
        data / "choices.jsonl",
        [
            {"instruction": f"{n}?", "answer": "true false solution1 answer1 ending1 option1"}
            for n in numbers
        ],
    )
    write_jsonl(
        data / "gsm8k.jsonl", [{"question": f"{n}?", "answer": f"#### {n}"} for n in numbers]
    )
    write_jsonl(data / "math.jsonl", [{"problem": f"{n}?", "answer": f"{n}"} for n in numbers])
    write_jsonl(
        data / "humaneval.jsonl",
        [{"task_id": "1", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): f()"}],
    )
    write_jsonl(
        data / "mbpp.jsonl", [{"task_id": 11, "text": "say 1", "test_list": ["assert f() == 1"]}]
    )
