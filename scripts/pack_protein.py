"""Pack UCI's CASP.csv into the file that ships with energyreg: `python scripts/pack_protein.py CASP.csv`."""

import argparse
import lzma

import numpy as np

from energyreg.datasets import load_protein
from energyreg.datasets.protein import BUNDLED, DECIMALS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", help="CASP.csv of https://doi.org/10.24432/C5QW3H")
    data = load_protein(parser.parse_args().csv)
    table = np.hstack([data.x, data.y])
    integers = np.rint(table * 10.0 ** np.array(DECIMALS)).astype(">i8")
    planes = np.ascontiguousarray(integers.T).view(np.uint8).reshape(len(DECIMALS), len(table), 8).transpose(0, 2, 1)
    BUNDLED.write_bytes(lzma.compress(planes.tobytes(), preset=9 | lzma.PRESET_EXTREME))

    packed = load_protein()
    if not (np.array_equal(packed.x, data.x) and np.array_equal(packed.y, data.y)):
        raise SystemExit(f"{BUNDLED} differs from the CSV: a column has more decimals than DECIMALS says")
    print(f"{BUNDLED}: {BUNDLED.stat().st_size:,} bytes, the same numbers as the CSV")


if __name__ == "__main__":
    main()
