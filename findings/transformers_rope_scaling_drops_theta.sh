#!/usr/bin/env bash
# A `rope_scaling` line added to a configuration that transformers 5 saved also resets rope_theta.
#
# Seen with transformers 5.24.0: version 5 writes all rotary settings as `rope_parameters`. Model cards
# say to add a `rope_scaling` line for long contexts. With both, `rope_parameters` is dropped as a whole,
# so a base of 1,000,000 becomes the default of 10,000, and nothing is said: the model loads and answers
# worse. Expected: the two are merged, or refused.
set -euo pipefail
packages=(transformers==5.24.0)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "${packages[@]}"
cd "$folder"
cat >program.py <<'PROGRAM'
import json
import tempfile
from pathlib import Path
from transformers import AutoConfig

saved = {
    "model_type": "qwen3",
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
for name, extra in {"as saved": {}, "with rope_scaling": {"rope_scaling": yarn}}.items():
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(saved | extra))
        rope = AutoConfig.from_pretrained(folder).rope_parameters
        print(name, {key: rope[key] for key in ("rope_type", "rope_theta")})
PROGRAM
cat >expected <<'EXPECTED'
as saved {'rope_type': 'default', 'rope_theta': 1000000.0}
with rope_scaling {'rope_type': 'yarn', 'rope_theta': 10000.0}
EXPECTED
"$folder/venv/bin/python" program.py 2>log >seen || { cat log >&2; exit 1; }
echo "${packages[*]}, $("$folder/venv/bin/python" --version)"
cat seen
diff expected seen
