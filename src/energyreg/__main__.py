"""`python -m energyreg`, and the command `energyreg`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command, or say what to install for it."""
    try:
        from energyreg.cli.app import app
    except ImportError as error:
        if error.name != "typer":
            raise
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    app(prog_name="energyreg")


if __name__ == "__main__":
    main()
