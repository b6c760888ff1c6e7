#!/usr/bin/env bash
# A TPU slice of several hosts: the same command on every host; JAX finds the others by itself.
#
# Ask before paying: droplora plan run.yaml --topology v5e:4x4
# The bucket is mounted as a folder that all hosts share; model.path may also be gs://... itself
# (install '.[tpu,gcs]' for that), output has to be a folder.
set -euo pipefail
: "${ZONE:?}" "${BUCKET:?}"
NAME=${NAME:-droplora}

gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" \
  --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite

on_all() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

on_all "python3 -m venv ~/.venvs/droplora && ~/.venvs/droplora/bin/pip install 'droplora-jax[tpu]'"
on_all "mkdir -p ~/shared && gcsfuse --implicit-dirs $BUCKET ~/shared"
on_all "cd ~/shared && ~/.venvs/droplora/bin/droplora train run.yaml output=runs/first"

# Only process 0 speaks. After a preemption, create the slice again, and run the last command again.
gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet
