#!/usr/bin/env bash
# transformers 5's Qwen2Tokenizer splits a text by its own rules, not by those of tokenizer.json.
#
# Seen with transformers 5.24.0 and tokenizers 0.23.3: the class builds its pre-tokenizer itself. A
# tokenizer.json with another one (here: numbers are kept whole), which a tokenizer_config.json calls
# Qwen2Tokenizer, gives other ids by AutoTokenizer than by the file, and nothing is said. The same file
# under the name GPT2TokenizerFast gives its own. Expected: what tokenizer.json says.
set -euo pipefail
packages=(transformers==5.24.0 tokenizers==0.23.3)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "${packages[@]}"
cd "$folder"
cat >program.py <<'PROGRAM'
import json
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

text = "In 2024 we saw 12345 birds."
own = Tokenizer(models.BPE())
bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
own.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=False), bytes_of]
)
own.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=400, initial_alphabet=bytes_of.alphabet(), show_progress=False
)
own.train_from_iterator([text] * 20, trainer)
print("tokenizer.json", own.encode(text).tokens)
for name in ("GPT2TokenizerFast", "Qwen2Tokenizer"):
    Path(name).mkdir()
    own.save(f"{name}/tokenizer.json")
    Path(name, "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    print(name, AutoTokenizer.from_pretrained(name).tokenize(text))
PROGRAM
cat >expected <<'EXPECTED'
tokenizer.json ['In', 'Ġ', '2024', 'Ġwe', 'Ġsaw', 'Ġ', '12345', 'Ġbirds', '.']
GPT2TokenizerFast ['In', 'Ġ', '2024', 'Ġwe', 'Ġsaw', 'Ġ', '12345', 'Ġbirds', '.']
Qwen2Tokenizer ['In', 'Ġ', '2', '0', '2', '4', 'Ġwe', 'Ġsaw', 'Ġ', '1', '2', '3', '4', '5', 'Ġbirds', '.']
EXPECTED
"$folder/venv/bin/python" program.py 2>log >seen || { cat log >&2; exit 1; }
echo "${packages[*]}, $("$folder/venv/bin/python" --version)"
cat seen
diff expected seen
