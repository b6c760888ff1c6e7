#!/usr/bin/env bash
# Orbax's CheckpointManager takes a checkpoint whose metric is NaN for the best one.
#
# Seen with orbax-checkpoint 0.12.8: of accuracies 0.5, 0.7 and NaN (say, of a run that diverged) the
# best step is the third, and with `max_to_keep=1` the first two are deleted. Where the NaN lies in
# between, a worse step than the best may be chosen. Expected: a NaN is never better than a number.
set -euo pipefail
packages=(orbax-checkpoint==0.12.8 jax==0.10.2)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "${packages[@]}"
cd "$folder"
cat >program.py <<'PROGRAM'
import tempfile
import numpy as np
import orbax.checkpoint as ocp

def save(accuracies, **options):
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics["accuracy"], best_mode="max", **options
    )
    with tempfile.TemporaryDirectory() as folder:
        with ocp.CheckpointManager(folder, options=options) as manager:
            for step, accuracy in enumerate(accuracies, 1):
                state = ocp.args.StandardSave({"x": np.zeros(2)})
                manager.save(step, args=state, metrics={"accuracy": accuracy})
            manager.wait_until_finished()
            print(accuracies, options.max_to_keep, "best:", manager.best_step(),
                  "kept:", list(manager.all_steps()))

nan = float("nan")
save([0.5, 0.7, nan])
save([0.5, 0.7, nan], max_to_keep=1)
save([0.7, nan, 0.5])
PROGRAM
cat >expected <<'EXPECTED'
[0.5, 0.7, nan] None best: 3 kept: [1, 2, 3]
[0.5, 0.7, nan] 1 best: 3 kept: [3]
[0.7, nan, 0.5] None best: 3 kept: [1, 2, 3]
EXPECTED
"$folder/venv/bin/python" program.py 2>log >seen || { cat log >&2; exit 1; }
echo "${packages[*]}, $("$folder/venv/bin/python" --version)"
cat seen
diff expected seen
