"""A plan as a table or as JSON, and what to change if it does not fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from droplora_jax.core.console import say
from droplora_jax.core.sharding import described
from droplora_jax.runs import config_reader
from droplora_jax.runs.open_base import open_base
from droplora_jax.runs.planning.hardware import GIB, topology
from droplora_jax.runs.planning.plan import Plan, plan, smallest_change


def show_plan(
    file: Path, overrides: Sequence[str], *, where: str, as_json: bool, console: Console
) -> None:
    """Print what the step of a run takes on devices that need not be here."""
    devices = topology(where)  # before JAX starts: it makes CPU devices
    config = config_reader.read(file, overrides)
    base = open_base(config.model)
    found = plan(config, base, devices)
    change = smallest_change(config, base, devices) if found.fits is False else None
    if as_json:
        better = {"overrides": change[0], **change[1].as_json()} if change else None
        console.out(json.dumps({**found.as_json(), "change": better}, indent=2), highlight=False)
        return
    for line in lines(found):
        say(console, line)
    if found.collectives:
        console.print(sent(found))
    if change:
        say(console, f"fits with: {' '.join(change[0])}")
        for line in lines(change[1]):
            say(console, f"  {line}")
    elif found.fits is False:
        say(console, "no micro-batch, remat or mesh that was tried fits: take more devices")


def lines(found: Plan) -> list[str]:
    """What a person wants to know, a line each."""
    mesh = f"s as {described(found.settings['mesh'])}" if found.devices > 1 else ""
    limit = f" of {_size(found.hbm_limit_bytes)}" if found.hbm_limit_bytes else ""
    fits = {True: "fits", False: "does not fit", None: "compiled"}[found.fits]
    parts = ", ".join(
        f"{name} {_size(getattr(found, name))}"
        for name in ("weights", "adapters", "optimizer", "temporaries")
    )
    made = [
        f"{found.topology}: {found.devices} device{mesh}, micro-batch "
        f"{found.settings['micro_batch']}, remat {found.settings['remat']}, "
        f"attention {found.settings['attention']}",
        f"{fits}: {_size(found.hbm_bytes_per_chip)}{limit} a device ({parts})",
        f"{found.flops_per_step / 1e12:,.1f} TFLOP a step of {found.tokens_per_step:,} tokens; "
        f"{found.arithmetic_intensity:,.0f} FLOP a byte of weights read",
    ]
    if found.tokens_per_second and found.mfu_at_most is not None:
        times = ", ".join(f"{name} {value:.3g} s" for name, value in found.seconds.items())
        made.append(f"a step takes at least: {times}")
        made.append(
            f"so at most {found.tokens_per_second:,.0f} tokens/s "
            f"({found.tokens_per_second / found.devices:,.0f} a device), MFU "
            f"{found.mfu_at_most:.0%}, bound by {found.bound}"
        )
    made.append(f"compiled in {found.compile_seconds:.0f} s")
    return made


def sent(found: Plan) -> Table:
    table = Table("collective", "over", "times a step", "to a device", box=SIMPLE_HEAD)
    for one in found.collectives:
        table.add_row(one.kind, one.axes, f"{one.count:,}", _size(one.bytes))
    return table


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:.2f} MiB"
