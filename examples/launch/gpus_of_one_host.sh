#!/usr/bin/env bash
# Several GPUs of one host: one process drives all of them.
#
# mesh.fsdp=-1 splits weights and rows over all; data=2 instead keeps two copies of the weights, which
# sends less. train.global_batch has to be a multiple of replica x data x fsdp.
set -euo pipefail

~/.venvs/droplora/bin/droplora train run.yaml mesh.fsdp=-1
# Some of them: CUDA_VISIBLE_DEVICES=0,1 droplora train run.yaml
