"""Every Python block of the documentation and the README runs, page by page, as a reader would type them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = {
    page.name: BLOCKS.findall(page.read_text(encoding="utf-8"))
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}


@pytest.mark.parametrize("page", [name for name, blocks in PAGES.items() if blocks])
def test_code_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(PAGES[page], 1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)


def test_picture_of_the_rooms_is_that_of_the_table() -> None:
    from scripts.draw_rooms import TARGET, draw
    from tests.test_rooms import ROOMS

    assert TARGET.read_text(encoding="utf-8") == draw(ROOMS), "run python -m scripts.draw_rooms"
