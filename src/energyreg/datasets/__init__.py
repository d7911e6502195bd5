"""Data sets as arrays or paths: bundled, or read from files that you name. Nothing is downloaded.

A loader of images returns a task: files (or arrays), targets with names and units, and what must stay together in a
split. Head poses are always (yaw, pitch, roll), with the signs of AFLW2000's files, in radians unless you ask for
degrees. Each loader's docstring names the source, the licence and the traps of its data.

All loaders raise FileNotFoundError where there is no such file or folder, or where one that belongs to another is
missing (the image that a table names, the labels of an image); ImportError where the library that reads such files is
not installed (Pillow, h5py or SciPy); and ValueError where there is nothing to load, a file is damaged, or something
that it should hold is missing, out of range or of another shape. The message names the file, and the row if any.
"""

from energyreg.datasets.aflw import load_300w_lp, load_aflw2000, load_aflw2000_landmarks
from energyreg.datasets.biwi import load_biwi, load_biwi_npz, load_headpose_features
from energyreg.datasets.cells import load_adipocytes, load_cell200, load_mbm_cells, load_vgg_cells
from energyreg.datasets.donkeycar import load_donkeycar
from energyreg.datasets.dots import count_dots, crops_with_counts, read_dots
from energyreg.datasets.protein import Protein, load_protein
from energyreg.datasets.splits import split_by_blocks, split_by_group
from energyreg.datasets.sullychen import load_steering_h5, load_sullychen
from energyreg.datasets.tasks import ArrayTask, CountTask, ImageTask, atoms
from energyreg.datasets.utkface import load_utkface, load_utkface_h5

__all__ = [
    "ArrayTask",
    "CountTask",
    "ImageTask",
    "Protein",
    "atoms",
    "count_dots",
    "crops_with_counts",
    "load_300w_lp",
    "load_adipocytes",
    "load_aflw2000",
    "load_aflw2000_landmarks",
    "load_biwi",
    "load_biwi_npz",
    "load_cell200",
    "load_donkeycar",
    "load_headpose_features",
    "load_mbm_cells",
    "load_protein",
    "load_steering_h5",
    "load_sullychen",
    "load_utkface",
    "load_utkface_h5",
    "load_vgg_cells",
    "read_dots",
    "split_by_blocks",
    "split_by_group",
]
