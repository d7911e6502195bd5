"""Coordinates of boxes relative to reference boxes.

A box is (x1, y1, x2, y2) in pixels, corners, without the extra pixel that some old code adds to its size. In model
space it is where its centre lies in the reference box's widths and heights, and the logarithm of its size:

>>> import torch
>>> space = BoxSpace(torch.tensor([[10.0, 10.0, 30.0, 50.0]]))
>>> space.to_model(torch.tensor([[12.0, 14.0, 32.0, 54.0]]))
tensor([[0.1000, 0.1000, 0.0000, 0.0000]])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BoxSpace"]


@dataclass(frozen=True)
class BoxSpace:
    r"""Coordinates of boxes relative to reference boxes, one for each of the B rows of a batch.

    .. math:: z = \left( \frac{c_x - c_x^0}{w_0}, \frac{c_y - c_y^0}{h_0}, \log\frac{w}{w_0}, \log\frac{h}{h_0} \right)

    The reference box itself is at 0. The papers' coordinates differ by a constant only, for the digits' sake. They do
    not change where an image is resized and its boxes with it.

    Args:
        reference: Reference boxes, corners in pixels, shape (B, 4).
    """

    reference: Tensor

    @property
    def dim(self) -> int:
        """Dimensions D = 4."""
        return 4

    @property
    def periodic(self) -> tuple[bool, ...]:
        """No dimension is an angle."""
        return (False,) * 4

    def _frame(self) -> tuple[Tensor, Tensor]:
        first, last = self.reference.split(2, -1)
        return (first + last) / 2, last - first

    def to_model(self, boxes: Tensor) -> Tensor:
        """Boxes to model space: corners in pixels to z, both of shape (*S, B, 4). NaN where a side is not positive."""
        centre, size = self._frame()
        first, last = boxes.split(2, -1)
        return torch.cat([((first + last) / 2 - centre) / size, ((last - first) / size).log()], -1)

    def to_user(self, z: Tensor) -> Tensor:
        """Points of model space to boxes: z to corners in pixels, both of shape (*S, B, 4)."""
        centre, size = self._frame()
        place, log_size = z.split(2, -1)
        centre, half = centre + size * place, size * log_size.exp() / 2
        return torch.cat([centre - half, centre + half], -1)

    def log_abs_det_jacobian(self, boxes: Tensor) -> Tensor:
        """log |det dz/dy| at boxes of shape (*S, B, 4), shape (*S, B): densities in z to densities per pixel⁴."""
        # Corners to centre and size has determinant 1.
        size = boxes[..., 2:] - boxes[..., :2]
        return -(self._frame()[1].log() + size.log()).sum(-1)

    def contains(self, boxes: Tensor) -> Tensor:
        """Whether boxes are finite and have positive sides, shape (*S, B)."""
        return boxes.isfinite().all(-1) & (boxes[..., 2:] > boxes[..., :2]).all(-1)
