"""The log of a run: `metrics.jsonl`, `loss.png` and TensorBoard files."""

from __future__ import annotations

import io
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from droplora_jax.core.files import Row, read_jsonl, write_file

# Before the name of a task:
ACCURACY = "accuracy/"
UNREAD = "unread/"  # how many completions had no answer that could be read


@runtime_checkable
class Board(Protocol):
    """A writer of TensorBoard files; tensorboardX is imported when it is made."""

    def add_scalar(self, name: str, value: float, step: int) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class Axes(Protocol):
    """A diagram of Matplotlib, which is imported when the first one is drawn."""

    def plot(self, *points: tuple[float, ...], **style: Any) -> object: ...


class MetricsLog:
    """One JSON object for each logged step, written whole, and the same numbers for TensorBoard."""

    def __init__(self, folder: Path, *, step: int) -> None:
        """Carry on at `step`: rows of later steps, which will run again, are removed."""
        self.folder, self.step = folder, step
        self.file = folder / "metrics.jsonl"
        self.plot_file = folder / "loss.png"
        self._cut(step)

    @cached_property
    def _board(self) -> Board:
        """Made with the first row: tensorboardX imports PyTorch where that is installed."""
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)

    def write(self, row: Row) -> None:
        """Append a row; it has its `step`, and numbers by name."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, row["step"])

    def plot(self) -> None:
        """Draw `loss.png` anew."""
        rows = read_jsonl(self.file)
        if rows:
            plot_losses(rows, self.plot_file)

    def close(self) -> None:
        if "_board" in self.__dict__:
            self._board.close()

    def _cut(self, step: int) -> None:
        rows = [row for row in read_jsonl(self.file) if row["step"] <= step]
        write_file(self.file, "".join(json.dumps(row) + "\n" for row in rows))


def plot_losses(rows: list[Row], file: Path) -> None:
    """The losses over the steps, and the accuracy of tasks below them, as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = sorted({key for row in rows for key in row if key.startswith(ACCURACY)})
    figure = Figure(figsize=(7, 6.5 if tasks else 4), layout="constrained")
    FigureCanvasAgg(figure)
    above, *below = figure.subplots(2 if tasks else 1, 1, sharex=True, squeeze=False)[:, 0]
    dots = {"marker": "o", "markersize": 4}
    _draw(above, rows, "loss", "training", linewidth=1.2)
    _draw(above, rows, "eval_loss", "evaluation", **dots)
    above.set(ylabel="loss per trained token (nats)")
    for axes in below:
        for task in tasks:
            _draw(axes, rows, task, task.removeprefix(ACCURACY), **dots)
        axes.set(ylabel="accuracy")
    for axes in (above, *below):
        axes.grid(alpha=0.3)
        axes.legend()
    (below or [above])[-1].set(xlabel="step")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_file(file, picture.getvalue())


def _draw(axes: Axes, rows: list[Row], key: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[key]) for row in rows if key in row]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)
