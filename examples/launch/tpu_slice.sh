#!/usr/bin/env bash
# A TPU slice of several hosts: the same command on every host; JAX finds the others by itself.
#
# Ask before paying: droplora plan run.yaml --topology v5e:4x4
# The bucket is mounted as a folder that all hosts share; model.path may also be gs://... itself
# ([tpu,gcs] in place of [tpu] for that), output has to be a folder.
set -euo pipefail
: "${ZONE:?}" "${BUCKET:?}"
NAME=${NAME:-droplora}

gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" \
  --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite

on_all() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

# In the bucket: run.yaml, what it names, and a checkout of this repository.
on_all "mkdir -p ~/shared && gcsfuse --implicit-dirs $BUCKET ~/shared"
on_all "python3 -m venv ~/.venvs/droplora && ~/.venvs/droplora/bin/pip install ~/shared/droplora_jax[tpu]"
on_all "cd ~/shared && ~/.venvs/droplora/bin/droplora train run.yaml output=runs/first"

# Only process 0 speaks. If it ends otherwise than well, this script ends here and the slice stays (and
# costs): run the command above again, after a preemption on a new slice, or delete it.
gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet
