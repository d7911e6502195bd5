"""Progress: what a terminal shows, what a log gets, and what stays silent."""

import pytest

from energyreg import progress
from energyreg.progress import Progress, duration


def count(**settings: object) -> None:
    with Progress("Scoring", "rows", **{"total": 1200, "wanted": True, **settings}) as shown:  # type: ignore[arg-type]
        for _ in range(3):
            shown(400)


@pytest.mark.parametrize("settings", [{"wanted": False}, {"wanted": None}, {"transient": True}, {"total": 0}])
def test_silent_where_nobody_looks(settings: dict, capsys: pytest.CaptureFixture[str]) -> None:
    count(**settings)
    assert capsys.readouterr() == ("", "")


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    count()
    out, line = capsys.readouterr()
    assert (out, line.count("\n")) == ("", 1)
    assert line.startswith("Scoring: 1,200 of 1,200 rows, ") and line.endswith(" a second, 0.0 s left\n")
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    shown = Progress("Scoring", "rows", 1200, True, done=200)
    shown.start()
    monkeypatch.setattr(progress.time, "perf_counter", lambda: shown.started + 20.0)
    shown(200)
    assert capsys.readouterr().err == "Scoring: 400 of 1,200 rows, 10 a second, 1 min 20 s left\n"


@pytest.mark.parametrize("total", [0, 1000, 1200])
def test_bar_on_a_terminal(total: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "160"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(progress, "SECONDS_PER_FRAME", 0.0)
    count(total=total, wanted=None)
    out, shown = capsys.readouterr()
    assert out == "" and "Scoring" in shown and ("1,200 of 1,200 rows, " if total else "1,200 rows, ") in shown
    assert (" left" in shown) == bool(total)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(float("nan"), "?"), (3.14, "3.1 s"), (42.2, "42 s"), (125.0, "2 min 05 s"), (7260.0, "2 h 01 min")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
