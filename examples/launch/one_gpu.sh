#!/usr/bin/env bash
# One GPU, from a checkout of this repository. Stop it with Ctrl-C and start it again: it goes on where it was.
set -euo pipefail

python3 -m venv ~/.venvs/droplora
~/.venvs/droplora/bin/pip install '.[cuda]'
~/.venvs/droplora/bin/droplora train run.yaml
