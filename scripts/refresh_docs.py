"""Run the Python blocks of documentation pages, and write what they print and draw back into the docs.

A block's output is the text block that directly follows it. Figures that a page saves under a bare name, such as
``figure.savefig("modes.png")``, go to docs/images. Run it after a change of the numbers on a page:

    python scripts/refresh_docs.py docs/intervals.md docs/counts.md
"""

import contextlib
import io
import re
import shutil
import sys
import tempfile
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "docs" / "images"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n.*?^```\n)?", re.MULTILINE | re.DOTALL)


def refresh(page: Path) -> None:
    """Run the blocks of a page in order, as one program, and replace their outputs."""
    namespace: dict[str, object] = {"__name__": "__main__"}

    def run(match: re.Match[str]) -> str:
        code, printed = match["code"], io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)
        block = f"```python\n{code}```\n"
        return f"{block}\n```text\n{printed.getvalue().rstrip()}\n```\n" if printed.getvalue().strip() else block

    text = BLOCK.sub(run, page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for path in [Path(name).resolve() for name in sys.argv[1:]]:
        # What else a page writes, such as model files, goes with the folder.
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            refresh(path)
            for figure in Path(folder).glob("*.png"):
                shutil.copy(figure, IMAGES)
