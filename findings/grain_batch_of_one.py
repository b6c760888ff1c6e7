"""Grain's endless data set, in batches of one, has no length: `len` raises an OverflowError.

Seen with grain 0.2.18: `repeat()` has a length of `sys.maxsize`. `batch(1)` divides it as a float,
which is rounded up beyond what a length may be, so whatever asks for the length fails; `batch(2)`
works, and so does `batch(1, drop_remainder=True)`, which counts in integers. Expected: a length, as
for every other batch size.
"""

from finding import show

PROGRAM = """
import grain

endless = grain.MapDataset.range(10).repeat()
for size, options in ((2, {}), (1, {"drop_remainder": True}), (1, {})):
    batches = endless.batch(size, **options)
    try:
        print(size, options, batches[0], len(batches))
    except OverflowError as error:
        print(size, options, "OverflowError:", error)
"""

EXPECTED = """
2 {} [0 1] 4611686018427387904
1 {'drop_remainder': True} [0] 9223372036854775807
1 {} OverflowError: cannot fit 'int' into an index-sized integer
"""

if __name__ == "__main__":
    show(["grain==0.2.18"], PROGRAM, EXPECTED)
