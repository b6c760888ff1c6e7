#!/usr/bin/env bash
# Several TPU slices as one run: replicas of the weights, whose adapters' gradients cross the data
# centre's network once a step.
#
# Ask before paying: droplora plan run.yaml mesh.replica=2 --topology 2xv5e:4x4
set -euo pipefail
: "${ZONE:?}" "${PROJECT:?}" "${BUCKET:?}"
SLICES=${SLICES:-2}
NAME=${NAME:-droplora}

gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" --project="$PROJECT" \
  --node-count="$SLICES" --node-prefix="$NAME" \
  --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite

echo "waiting for the slices"
until gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --project="$PROJECT" \
  --format='value(state.state)' | grep -q ACTIVE; do sleep 30; done

on_all() {
  gcloud compute tpus queued-resources ssh "$NAME" --zone="$ZONE" --project="$PROJECT" \
    --node=all --worker=all --command="$1"
}

# In the bucket: run.yaml, what it names, and a checkout of this repository.
on_all "mkdir -p ~/shared && gcsfuse --implicit-dirs $BUCKET ~/shared"
on_all "python3 -m venv ~/.venvs/droplora && ~/.venvs/droplora/bin/pip install ~/shared/droplora_jax[tpu]"
on_all "cd ~/shared && ~/.venvs/droplora/bin/droplora train run.yaml mesh.replica=$SLICES"
