#!/usr/bin/env bash
# One GPU. Stop it with Ctrl-C and start it again: it goes on where it was.
set -euo pipefail

python3 -m venv ~/.venvs/droplora
~/.venvs/droplora/bin/pip install 'droplora-jax[cuda]'
~/.venvs/droplora/bin/droplora train run.yaml
