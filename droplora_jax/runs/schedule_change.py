"""What becomes of a schedule that is laid out over a run's steps when their number changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import optax

from droplora_jax.runs.config import RunConfig
from droplora_jax.training import optimizer

Layout = Callable[[int], optax.Schedule | None]  # from the steps of a run to a schedule


def schedule_changes(config: RunConfig, saved: int, before: int, steps: int) -> Iterator[str]:
    """A sentence for every schedule of a run that does not go on as it was.

    Args:
      saved: the steps that the run has taken.
      before: the steps that it had in all when it took them.
      steps: the steps that it has in all now.
    """
    if not 0 < saved < steps or before == steps:
        return
    layouts: Mapping[str, Layout] = {
        f"learning rate (optim.schedule={config.optim.schedule})": (
            lambda total: optimizer.learning_rate(config.optim, total)
        ),
        "share of the drop rates (adapter.drop_schedule)": config.adapter.share,
    }
    for name, layout in layouts.items():
        old, new = layout(before), layout(steps)
        if old is None or new is None:
            continue
        expected, following = float(old(saved)), float(new(saved))
        if not math.isclose(expected, following, rel_tol=1e-5):
            yield (
                f"warning: the {name} was laid out over {before:,} steps and is now over {steps:,}:"
                f" it goes from {float(old(saved - 1)):.3g} at step {saved:,} to {following:.3g} at"
                f" step {saved + 1:,}"
            )
