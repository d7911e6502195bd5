"""Where the real data are, if they are here: a folder `shared/data` beside the repository."""

from collections.abc import Callable
from pathlib import Path

import pytest

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def real() -> Callable[[str], Path]:
    """Path of a part of the real data; skips the test where it is absent."""

    def path_of(name: str) -> Path:
        if not (REAL / name).exists():
            pytest.skip(f"the real data are not here: no {name} in shared/data beside the repository")
        return REAL / name

    return path_of
