#!/usr/bin/env bash
# transformers loads a DoRA adapter that PEFT saved without its trained magnitudes.
#
# Seen with transformers 5.24.0 and peft 0.21.2: PEFT stores a magnitude as
# `lora_magnitude_vector`, and the module has it as `lora_magnitude_vector.default.weight`. PEFT maps
# one to the other; the integrated loader of `AutoModelForCausalLM.from_pretrained` does not. It lists
# the magnitudes in its report of unexpected and missing tensors, makes new ones from the base, and
# returns a model that computes something else. Expected: the same logits, or an error.
set -euo pipefail
packages=(torch==2.13.0 transformers==5.24.0 peft==0.21.2)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "${packages[@]}"
cd "$folder"
cat >program.py <<'PROGRAM'
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)
LlamaForCausalLM(config).save_pretrained("base")

def base():
    return AutoModelForCausalLM.from_pretrained("base")

@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(24).reshape(2, 12)).logits

for name, dora in (("LoRA", False), ("DoRA", True)):
    options = LoraConfig(r=4, target_modules=["v_proj"], use_dora=dora)
    model = get_peft_model(base(), options)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
        if "magnitude" in key:
            parameter.data *= 2
    expected = logits(model)
    model.save_pretrained(name)
    loaded = {
        "PEFT": PeftModel.from_pretrained(base(), name),
        "transformers": AutoModelForCausalLM.from_pretrained(name),
    }
    for loader, model in loaded.items():
        off = float((logits(model) - expected).norm() / expected.norm())
        print(name, "by", loader, "is the same" if off < 1e-6 else "is another model")
PROGRAM
cat >expected <<'EXPECTED'
LoRA by PEFT is the same
LoRA by transformers is the same
DoRA by PEFT is the same
DoRA by transformers is another model
EXPECTED
"$folder/venv/bin/python" program.py 2>log >seen || { cat log >&2; exit 1; }
echo "${packages[*]}, $("$folder/venv/bin/python" --version)"
cat seen
diff expected seen
