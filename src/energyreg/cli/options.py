"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Data", "Identifier", "Json", "Model", "Quiet", "Seed", "Strict", "TableOutput", "TargetOfData", "Threads"]

Data = Annotated[
    Path,
    typer.Argument(help="Table: .csv, .tsv, .csv.gz, .parquet or .feather; - for standard input.", show_default=False),
]
Model = Annotated[Path, typer.Argument(help="File that `energyreg fit` wrote.", show_default=False)]
TableOutput = Annotated[
    Path, typer.Option("--output", "-o", help="Table to write: .csv, .parquet or .feather; - for standard output.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse cells that are no numbers or dates in such columns.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors and warnings.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1)]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch.", show_default="PyTorch's own")]
Identifier = Annotated[
    list[str] | None,
    typer.Option(
        "--id",
        help="Column to copy to the output; may be repeated.",
        show_default="those that the model was not fitted on, or the row",
    ),
]
TargetOfData = Annotated[
    list[str] | None, typer.Option("--target", "-t", help="Target column, where the model file does not say it.")
]
