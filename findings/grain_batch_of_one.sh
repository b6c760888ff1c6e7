#!/usr/bin/env bash
# Grain's endless data set, in batches of one, has no length: `len` raises an OverflowError.
#
# Seen with grain 0.2.18: `repeat()` has a length of `sys.maxsize`. `batch(1)` divides it as a float,
# which is rounded up beyond what a length may be, so whatever asks for the length fails; `batch(2)`
# works, and so does `batch(1, drop_remainder=True)`, which counts in integers. Expected: a length, as
# for every other batch size.
set -euo pipefail
packages=(grain==0.2.18)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "${packages[@]}"
cd "$folder"
cat >program.py <<'PROGRAM'
import grain

endless = grain.MapDataset.range(10).repeat()
for size, options in ((2, {}), (1, {"drop_remainder": True}), (1, {})):
    batches = endless.batch(size, **options)
    try:
        print(size, options, batches[0], len(batches))
    except OverflowError as error:
        print(size, options, "OverflowError:", error)
PROGRAM
cat >expected <<'EXPECTED'
2 {} [0 1] 4611686018427387904
1 {'drop_remainder': True} [0] 9223372036854775807
1 {} OverflowError: cannot fit 'int' into an index-sized integer
EXPECTED
"$folder/venv/bin/python" program.py 2>log >seen || { cat log >&2; exit 1; }
echo "${packages[*]}, $("$folder/venv/bin/python" --version)"
cat seen
diff expected seen
