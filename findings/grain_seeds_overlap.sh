#!/usr/bin/env bash
# Grain's shuffles of neighbouring seeds repeat each other.
#
# Seen with grain 0.2.18: `shuffle(seed).repeat()` reshuffles each epoch with seed + epoch, so that
# the second epoch of seed 0 is the first epoch of seed 1. Runs with seeds 0, 1 and 2, meant to be
# independent, see mostly the same orders. Expected: another order for every seed and epoch.
set -euo pipefail
packages=(grain==0.2.18)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "${packages[@]}"
cd "$folder"
cat >program.py <<'PROGRAM'
import grain

def epoch(seed, number, size=8):
    data = grain.MapDataset.range(size).shuffle(seed=seed).repeat()
    return [int(data[i]) for i in range(number * size, (number + 1) * size)]

print("seed 0, epoch 0:", epoch(0, 0))
print("seed 0, epoch 1:", epoch(0, 1))
print("seed 1, epoch 0:", epoch(1, 0))
PROGRAM
cat >expected <<'EXPECTED'
seed 0, epoch 0: [0, 4, 6, 7, 5, 3, 1, 2]
seed 0, epoch 1: [5, 7, 6, 0, 4, 1, 3, 2]
seed 1, epoch 0: [5, 7, 6, 0, 4, 1, 3, 2]
EXPECTED
"$folder/venv/bin/python" program.py 2>log >seen || { cat log >&2; exit 1; }
echo "${packages[*]}, $("$folder/venv/bin/python" --version)"
cat seen
diff expected seen
