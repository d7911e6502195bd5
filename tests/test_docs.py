"""Every Python block of the documentation and the README runs, as a reader types it, and prints what it shows."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.(\d*))?(?:e-?\d+)?")
PAGES = {
    page.name: BLOCKS.findall(page.read_text(encoding="utf-8"))
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}


@pytest.mark.parametrize("page", [name for name, blocks in PAGES.items() if blocks])
def test_code_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, (block, shown) in enumerate(PAGES[page], 1):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block, f"{page}, block {number}", "exec"), namespace)
        if shown:
            assert_alike(printed.getvalue(), shown)


def assert_alike(printed: str, shown: str) -> None:
    """The same words, and numbers that differ by what another machine's rounding and seeds of its libraries may change.

    That is 10 %, or 3 in the last digit that is shown; what is drawn at random may be anything.
    """
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), f"printed:\n{printed}\nshown:\n{shown}"
    for line, expected in zip(printed.splitlines(), shown.splitlines(), strict=True):
        if "draws" in line:
            continue
        for found, wanted in zip(NUMBER.finditer(line), NUMBER.finditer(expected), strict=True):
            value, target = float(found[0]), float(wanted[0])
            digit = 10.0 ** -len(wanted[1] or "")
            assert abs(value - target) <= max(0.1 * abs(target), 3.001 * digit), f"{line!r} is shown as {expected!r}"


def test_other_words_and_numbers_would_be_seen() -> None:
    assert_alike("mean 12.31, interval -1e-07 to 5\n", "mean 12.01, interval -1.05e-07 to 4\n")
    for printed in ("mean 14.31 m\n", "mean 12.01 km\n", "mean 12.01 m 3\n", "mean m\n"):
        with pytest.raises(AssertionError):
            assert_alike(printed, "mean 12.01 m\n")


def test_picture_of_the_rooms_is_that_of_the_table() -> None:
    from scripts.draw_rooms import TARGET, draw
    from tests.test_rooms import ROOMS

    assert TARGET.read_text(encoding="utf-8") == draw(ROOMS), "run python -m scripts.draw_rooms"
