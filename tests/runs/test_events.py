"""The log of a run: whole lines, cut back on resuming, readable while it is written and after a crash."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trivium.runs.events import MAX_SPECIMENS, EventLog, read_events, read_metrics


@pytest.fixture
def log(tmp_path: Path):
    """Return an open log."""
    opened = EventLog(tmp_path, "sft-1")
    yield opened
    opened.close()


def test_metrics_come_back_by_name_in_order(log: EventLog, tmp_path: Path) -> None:
    """Points as they were given, readable before the log is closed."""
    for step in (1, 2, 3):
        log.metric("train/loss", 1 / step, step)
        log.metric("train/lr", step, step)
    assert read_metrics(tmp_path) == {
        "train/loss": [(1, 1.0), (2, 0.5), (3, 1 / 3)],
        "train/lr": [(1, 1.0), (2, 2.0), (3, 3.0)],
    }
    event = next(read_events(tmp_path, kind="metric"))
    assert (event.run_id, event.step, event.kind, event.name) == ("sft-1", 1, "metric", "train/loss")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_everywhere(log: EventLog, tmp_path: Path, value: float) -> None:
    """JSON has no NaN: metrics, and numbers inside samples and specimens, become null, so that any reader reads on."""
    log.metric("train/loss", value, 1)
    log.metric("train/loss", 2.0, 2)
    log.sample("rollout", {"score": value, "text": "NaN"}, 1)
    log.specimen("rollout", {"kl": [0.5, value]})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for name in ("events.jsonl", "specimens.jsonl"):
        for line in (tmp_path / name).read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    assert read_metrics(tmp_path) == {"train/loss": [(2, 2.0)]}
    assert [e.value for e in read_events(tmp_path, kind="metric")] == [None, 2.0]
    assert [e.value for e in read_events(tmp_path, kind="sample")] == [{"score": None, "text": "NaN"}]
    assert [e.value for e in read_events(tmp_path, kind="specimen")] == [{"kl": [0.5, None]}]


def test_cut_back_to_a_checkpoint_the_log_is_as_it_was(log: EventLog, tmp_path: Path) -> None:
    """Bytes equal those at the time of `offsets`, and what is written next follows them; so does the specimen count."""
    log.metric("a", 1, 1)
    log.specimen("s", "é one")
    offsets = log.offsets()
    before = [(tmp_path / name).read_bytes() for name in ("events.jsonl", "specimens.jsonl")]
    assert [len(data) for data in before] == [offsets["events"], offsets["specimens"]]
    for step in range(2, 40):
        log.metric("a", step, step)
        log.specimen("s", step)
    log.truncate(offsets)
    assert [(tmp_path / name).read_bytes() for name in ("events.jsonl", "specimens.jsonl")] == before
    log.metric("a", 2, 2)
    assert read_metrics(tmp_path) == {"a": [(1, 1.0), (2, 2.0)]}
    kept = [log.specimen("s", n) for n in range(MAX_SPECIMENS)]
    assert kept == [True] * (MAX_SPECIMENS - 1) + [False]
    assert len(list(read_events(tmp_path, kind="specimen"))) == MAX_SPECIMENS


def test_specimens_are_limited_by_name_also_across_processes(log: EventLog, tmp_path: Path) -> None:
    """Twenty of each name; a log that is opened again goes on counting."""
    assert [log.specimen("a", n) for n in range(MAX_SPECIMENS + 2)][-3:] == [True, False, False]
    assert log.specimen("b", 0)
    log.close()
    again = EventLog(tmp_path, "sft-1")
    assert not again.specimen("a", "more")
    assert again.specimen("b", 1)
    again.close()


def test_half_a_line_is_passed_over_and_spoils_no_other(log: EventLog, tmp_path: Path) -> None:
    """A writer that died within a line: readers pass over it, and the next writer does not append to it."""
    log.metric("a", 1, 1)
    log.specimen("s", 1)
    log.close()
    for name in ("events.jsonl", "specimens.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(b'{"run_id": "sft-1", "step": 2, "ti')
    assert read_metrics(tmp_path) == {"a": [(1, 1.0)]}
    again = EventLog(tmp_path, "sft-1")
    again.metric("a", 3, 3)
    again.specimen("s", 2)
    again.close()
    assert read_metrics(tmp_path) == {"a": [(1, 1.0), (3, 3.0)]}
    assert [e.value for e in read_events(tmp_path, kind="specimen")] == [1, 2]


def test_any_text_survives(log: EventLog, tmp_path: Path) -> None:
    """Line separators, NUL, emoji and a lone surrogate are one line each and come back as they were."""
    texts = ["a\nb\rc\u2028d\x85e", "\x00", "\U0001f600", "\ud800 alone", '"quoted" \\n']
    for step, text in enumerate(texts):
        log.sample("text", text, step)
    assert [e.value for e in read_events(tmp_path, kind="sample")] == texts
    assert len((tmp_path / "events.jsonl").read_bytes().split(b"\n")) == len(texts) + 1


def test_a_folder_without_a_log_has_no_events(tmp_path: Path) -> None:
    """Pages look into folders that are not there yet."""
    assert list(read_events(tmp_path / "none")) == []
    assert read_metrics(tmp_path / "none") == {}
