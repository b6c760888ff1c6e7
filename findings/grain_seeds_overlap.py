"""Grain's shuffles of neighbouring seeds repeat each other.

Seen with grain 0.2.18: `shuffle(seed).repeat()` reshuffles each epoch with seed + epoch, so that
the second epoch of seed 0 is the first epoch of seed 1. Runs with seeds 0, 1 and 2, meant to be
independent, see mostly the same orders. Expected: another order for every seed and epoch.
"""

from finding import show

PROGRAM = """
import grain

def epoch(seed, number, size=8):
    data = grain.MapDataset.range(size).shuffle(seed=seed).repeat()
    return [int(data[i]) for i in range(number * size, (number + 1) * size)]

print("seed 0, epoch 0:", epoch(0, 0))
print("seed 0, epoch 1:", epoch(0, 1))
print("seed 1, epoch 0:", epoch(1, 0))
"""

EXPECTED = """
seed 0, epoch 0: [0, 4, 6, 7, 5, 3, 1, 2]
seed 0, epoch 1: [5, 7, 6, 0, 4, 1, 3, 2]
seed 1, epoch 0: [5, 7, 6, 0, 4, 1, 3, 2]
"""

if __name__ == "__main__":
    show(["grain==0.2.18"], PROGRAM, EXPECTED)
