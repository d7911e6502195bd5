"""Draw the rooms of the package, and which may import which, as `docs/images/rooms.svg`.

    python -m scripts.draw_rooms

The picture comes from the table that tests/test_rooms.py checks the code against, so that it cannot be wrong.
"""

from __future__ import annotations

from pathlib import Path

from tests.test_rooms import ROOMS

TARGET = Path(__file__).parents[1] / "docs" / "images" / "rooms.svg"
CONTENT: dict[str, tuple[float, str]] = {
    "ground": (2, "checks, errors, files, progress"),
    "plots": (3, "figures"),
    "datasets": (4, "readers of public data"),
    "densities": (2, "spaces, bases, mixtures, noise"),
    "inference": (2, "energies, nodes, chains, modes"),
    "networks": (3, "encoders, heads, proposals"),
    "objectives": (2, "losses, NCE, scores, quadrature"),
    "models": (2, "model, predictive, calibration"),
    "training": (2, "fit, ensembles, chains"),
    "tables": (1, "columns, preprocessing, files"),
    "images": (1, "reading, features, augment"),
    "estimators": (2, "EnergyRegressor, ImageRegressor"),
    "scoring": (3, "rows to named columns"),
    "evaluation": (2, "scores, simple forecasts"),
    "reports": (2, "HTML pages"),
    "vision.boxes": (1, "box space, noise, density"),
    "vision.pooling": (0, "exact RoI pooling"),
    "vision.detection": (0.35, "energy head for detectors"),
    "vision": (0.7, "public names"),
    "cli": (2, "the command line"),
}
"""Column of a room in the picture, and what is in it."""
BOX, GAP, ROW, PAD = (212, 46), 18, 78, 16
INK, PAPER, FRAME, ARROW = "#1b2a3a", "#ffffff", "#4a7ab0", "#b9c4d0"


def floors(rooms: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by the longest way down to the ground, lowest floor first."""
    level: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in level:
            level[room] = max((height(other) + 1 for other in rooms[room]), default=0)
        return level[room]

    for room in rooms:
        height(room)
    return [[room for room in rooms if level[room] == floor] for floor in range(max(level.values()) + 1)]


def places(rooms: dict[str, set[str]]) -> dict[str, tuple[float, float]]:
    """The middle of each room's box."""
    found = {}
    for floor, row in enumerate(reversed(floors(rooms))):
        for room in row:
            found[room] = (PAD + BOX[0] / 2 + CONTENT[room][0] * (BOX[0] + GAP), PAD + BOX[1] / 2 + floor * ROW)
    return found


def below(room: str, rooms: dict[str, set[str]]) -> set[str]:
    """All rooms that can be reached from a room."""
    return set(rooms[room]).union(*(below(other, rooms) for other in rooms[room]))


def draw(rooms: dict[str, set[str]]) -> str:
    """The picture as SVG."""
    at = places(rooms)
    width = max(x for x, _ in at.values()) + BOX[0] / 2 + PAD
    height = max(y for _, y in at.values()) + BOX[1] / 2 + PAD
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif" '
        'role="img" aria-label="Rooms of the package; arrows point to what a room imports">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{FRAME}"/></marker></defs>',
        f'<rect width="100%" height="100%" fill="{PAPER}"/>',
    ]
    for room, others in rooms.items():
        x, top = at[room]
        implied = set[str]().union(*(below(other, rooms) for other in others))
        for other in sorted(others - implied):
            to, bottom = at[other]
            start, end = top + BOX[1] / 2, bottom - BOX[1] / 2 - 1
            bend = (end - start) / 2
            out = x + max(min((to - x) / 2, 0.45 * BOX[0]), -0.45 * BOX[0])  # from the side that the arrow leaves to
            lines.append(
                f'<path d="M{out:.0f} {start:.0f}C{out:.0f} {start + bend:.0f} {to:.0f} {end - bend:.0f} {to:.0f} '
                f'{end:.0f}" fill="none" stroke="{ARROW}" stroke-width="1.5" marker-end="url(#tip)"/>'
            )
    for room, (x, y) in at.items():
        lines += [
            f'<rect x="{x - BOX[0] / 2:.0f}" y="{y - BOX[1] / 2:.0f}" width="{BOX[0]}" height="{BOX[1]}" rx="6" '
            f'fill="{PAPER}" stroke="{FRAME}"/>',
            f'<text x="{x:.0f}" y="{y - 3:.0f}" text-anchor="middle" font-size="15" font-weight="bold" '
            f'fill="{INK}">{room}</text>',
            f'<text x="{x:.0f}" y="{y + 14:.0f}" text-anchor="middle" font-size="11.5" fill="{INK}">{CONTENT[room][1]}'
            "</text>",
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    """Write the picture."""
    TARGET.write_text(draw(ROOMS), encoding="utf-8")
    print(TARGET)


if __name__ == "__main__":
    main()
