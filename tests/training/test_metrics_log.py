"""metrics.jsonl, whole and cut back to where a run carries on; the picture; the board."""

from __future__ import annotations

import json
import struct

import pytest
from matplotlib.image import imread
from tensorboardX.proto.event_pb2 import Event

from droplora_jax.core.files import read_jsonl
from droplora_jax.training.metrics_log import MetricsLog, plot_losses

ROWS = [
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": 2.0},
    {"step": 2, "eval_loss": 2.5},
    {"step": 3, "loss": 1.0},
]


@pytest.fixture
def folder(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    for row in ROWS:
        log.write(row)
    log.close()
    return tmp_path


def test_rows_there_and_back(folder):
    assert read_jsonl(folder / "metrics.jsonl") == ROWS


def test_no_file_is_no_rows(tmp_path):
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_a_row_is_on_disk_when_it_is_written(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    log.write(ROWS[0])
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps(ROWS[0]) + "\n"
    log.close()


@pytest.mark.parametrize(("step", "left"), [(0, 0), (1, 1), (2, 3), (3, 4), (9, 4)])
def test_carrying_on_cuts_the_rows_of_steps_that_run_again(folder, step, left):
    MetricsLog(folder, step=step).close()
    assert read_jsonl(folder / "metrics.jsonl") == ROWS[:left]
    assert [path.name for path in folder.glob("metrics*")] == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', '{"step": 4', "\x00\x00\x00", '{"loss'])
def test_a_row_that_a_crash_cut_short_goes(folder, tail):
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text() + tail)
    assert read_jsonl(file) == ROWS
    log = MetricsLog(folder, step=3)
    log.write({"step": 4, "loss": 0.5})
    log.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 2, 3, 4]


def events(folder) -> list[Event]:
    """TensorBoard's files: length, checksum, event, checksum, and so on."""
    found = []
    for file in sorted(folder.glob("events*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_the_same_numbers_are_on_the_board(folder):
    values = [
        (event.step, value.tag, value.simple_value)
        for event in events(folder / "tensorboard")
        for value in event.summary.value
    ]
    expected = [(row["step"], name, row[name]) for row in ROWS for name in row if name != "step"]
    assert values == expected


def test_the_board_is_told_which_steps_run_again(folder):
    (first,) = (folder / "tensorboard").iterdir()
    first.rename(first.with_name("another day"))  # files are named by the second
    log = MetricsLog(folder, step=2)
    log.write({"step": 3, "loss": 1.0})
    log.close()
    starts = [event.step for event in events(folder / "tensorboard") if event.session_log.status]
    assert starts == [3]


def test_the_picture_shows_both_curves(tmp_path):
    def dark(rows):
        plot_losses(rows, tmp_path / "loss.png")
        return (imread(tmp_path / "loss.png")[..., :3].min(axis=-1) < 0.5).sum()

    training = [row for row in ROWS if "loss" in row]
    assert dark(ROWS) > dark(training) > dark(training[:1]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_no_rows_no_picture(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    log.plot()
    log.close()
    assert not (tmp_path / "loss.png").exists()


def test_plot_draws_what_was_written(folder):
    log = MetricsLog(folder, step=3)
    log.plot()
    log.close()
    assert imread(folder / "loss.png").ndim == 3
