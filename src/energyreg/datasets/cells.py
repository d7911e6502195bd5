"""Cells to count: VGG (simulated fluorescence), MBM (bone marrow), adipocytes (fat tissue) and Cell-200."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from energyreg.datasets.dots import read_dots
from energyreg.datasets.files import PathLike, existing_file, existing_folder, natural_key, pictures, read_h5_images
from energyreg.datasets.tasks import ArrayTask, CountTask

__all__ = ["load_adipocytes", "load_cell200", "load_mbm_cells", "load_vgg_cells"]

COUNTCEPTION = "through github.com/ieee8023/countception; Cohen et al., ICCV workshops 2017"
PICTURES = {".png", ".jpg", ".jpeg"}
MBM_NAME = re.compile(r"BM_GRAZ_HE_(\d+)_(\d+)_(\d+)")
MBM_DOTS = re.compile(r"BM_GRAZ_HE_(\d+)_(\d+)_(?:(\d+)_dots|dots_(\d+))")
DONOR = re.compile(r"(GTEX-[0-9A-Z]+)_")


def load_vgg_cells(path: PathLike) -> CountTask:
    """Load the VGG cells: 200 simulated fluorescence images of 256×256 pixels, with 74 to 317 cells each.

    Files are `001cell.png` with its dots in `001dots.png`, to `200cell.png`. The usual protocol trains on up to 64 of
    the first 100, and tests on the last 100. No checksum is published.

    Traps:

    - Dots touch: a cell is a pixel, not a connected component (see :func:`energyreg.datasets.read_dots`).
    - Cells are simulated and overlap, so that their number is known, and not always to be seen.
    - Counts are integers: dequantise before you compare likelihoods.

    Args:
        path: The folder.

    Returns:
        Images in natural order, with the number of cells.
    """
    folder = existing_folder(path, "the VGG cells' folder of 001cell.png with 001dots.png")
    files = sorted(folder.glob("*cell.png"), key=natural_key)
    pairs = [(file, file.with_name(f"{file.name.removesuffix('cell.png')}dots.png")) for file in files]
    return _counted(
        folder,
        pairs,
        "001cell.png",
        source=f"VGG cells, Lempitsky and Zisserman, NeurIPS 2010, {COUNTCEPTION}",
        licence="none stated; the standard benchmark",
        groups=None,
    )


def load_mbm_cells(path: PathLike) -> CountTask:
    """Load the modified bone marrow cells (MBM): 44 H&E images of 600×600 pixels, with 65 to 195 cells each.

    Files are `BM_GRAZ_HE_0001_01_000.png` (or .jpg), with the dots in `BM_GRAZ_HE_0001_01_dots_000.png`, as released,
    or in `BM_GRAZ_HE_0001_01_000_dots.png`. No checksum is published.

    Traps:

    - The 44 images are quarters of 11 pictures of 8 people: split by `groups`, never by file.
    - It is small. :func:`energyreg.datasets.crops_with_counts` cuts each image into crops with their own counts.

    Args:
        path: The folder.

    Returns:
        Images in natural order, with the number of cells; `groups` is the person ("0001").
    """
    folder = existing_folder(path, "MBM's folder of BM_GRAZ_HE_0001_01_000.png with dots")
    found = pictures(folder, PICTURES)
    dots = {}
    for file in found:
        if match := MBM_DOTS.fullmatch(file.stem):
            dots[match[1], match[2], match[3] or match[4]] = file
    pairs, groups = [], []
    for file in found:
        if match := MBM_NAME.fullmatch(file.stem):
            default = file.with_name(f"BM_GRAZ_HE_{match[1]}_{match[2]}_dots_{match[3]}.png")
            pairs.append((file, dots.get((match[1], match[2], match[3]), default)))
            groups.append(match[1])
    return _counted(
        folder,
        pairs,
        "BM_GRAZ_HE_0001_01_000.png",
        source=f"MBM, Kainz et al., MICCAI 2015, {COUNTCEPTION}",
        licence="none stated; cite Kainz et al. 2015 and Cohen et al. 2017",
        groups=groups,
    )


def load_adipocytes(path: PathLike) -> CountTask:
    """Load the adipocytes: 200 regions of fat tissue of 150×150 pixels, sampled at 1700×1700 from slides of GTEx.

    Files are `images/X-Y_GTEX-DONOR_Adipose-Subcutaneous.jpeg`, with the dots under the same name in `annotations/`.
    No checksum is published.

    Traps:

    - **The dots are in JPEG**: they are smeared, and dots that touch cannot be told apart (see
      :func:`energyreg.datasets.read_dots`). This was tried on dots that were compressed for the purpose, not on the
      real files: look at some before you trust the counts.
    - Some donors have more than one region: split by `groups`.

    Args:
        path: The folder that holds `images` and `annotations`.

    Returns:
        Images in natural order, with the number of cells; `groups` is the donor ("GTEX-13QJC").
    """
    folder = existing_folder(path, "the adipocytes' folder, with images and annotations in it")
    images = existing_folder(folder / "images", "the adipocytes' images")
    files = pictures(images, PICTURES)
    groups = []
    for file in files:
        match = DONOR.search(file.name)
        if match is None:
            raise ValueError(f"{file} has no donor in its name; expected X-Y_GTEX-DONOR_Adipose-Subcutaneous.jpeg.")
        groups.append(match[1])
    return _counted(
        images,
        [(file, folder / "annotations" / file.name) for file in files],
        "X-Y_GTEX-DONOR_Adipose-Subcutaneous.jpeg",
        source=f"adipocytes of the Genotype Tissue Expression Consortium (GTEx), {COUNTCEPTION}",
        licence="none stated with the files; GTEx asks to be acknowledged",
        groups=groups,
    )


def _counted(
    folder: Path, pairs: list[tuple[Path, Path]], example: str, *, groups: list[str] | None, **fields: Any
) -> CountTask:
    """The task of images and their images of dots; `fields` are its source and licence."""
    if not pairs:
        raise ValueError(f"{folder} holds no images; expected files such as {example}.")
    dots = [read_dots(existing_file(path, f"the dots of {file.name}")) for file, path in pairs]
    return CountTask(
        files=[file for file, _ in pairs],
        targets=np.array([[float(len(found))] for found in dots]),
        names=("cells",),
        units=("cells",),
        groups=None if groups is None else np.array(groups),
        dots=dots,
        **fields,
    )


def load_cell200(path: PathLike, *, part: str | None = None) -> ArrayTask:
    """Load Cell-200 as prepared for CcGAN and used in paper IV: simulated grey images with 1 to 200 cells, in HDF5.

    The file holds `IMGs_grey` and `CellCounts`, and in some editions `IMGs_grey_test` and `CellCounts_test`. Paper IV
    draws 10,000 rows to train and 10,000 to test by an unseeded shuffle, so that its split cannot be had again.

    Args:
        path: `Cell200_64x64.h5`.
        part: "test" for the arrays of that name, None for the others.

    Returns:
        Images as uint8, shape (N, 1, H, W), with the number of cells.

    Source:
        Ding et al., CcGAN, ICLR 2021 (github.com/UBCDingXin/improved_CcGAN); Gustafsson et al., AISTATS 2022.
    """
    if part not in (None, "test"):
        raise ValueError(f"part is {part!r}; expected None or 'test'.")
    suffix = "" if part is None else "_test"
    keys = (f"IMGs_grey{suffix}", f"CellCounts{suffix}")
    images, counts = read_h5_images(path, "CcGAN's Cell-200", keys, channels=1)
    return ArrayTask(
        x=images,
        targets=counts[:, None],
        names=("cells",),
        units=("cells",),
        source="Cell-200, Ding et al., ICLR 2021, made with SIMCEP",
        licence="none stated",
    )
