"""The loss of JPEG as tensor arithmetic, for batches on a GPU: colours, DCT, quantisation, and back.

Entropy coding is lossless, so it is left out. The result differs from libjpeg's by rounding, since that computes in
integers; tests/training/test_jpeg.py bounds the difference. ITU-T T.81; chroma 4:2:0 as in JFIF.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

# Annex K of T.81, row by row; qualities scale it as in libjpeg.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *[(99,) * 8] * 4,
)
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
BLOCK = 8
UNIT = 16  # pixels per side that share whole blocks of chroma


def roundtrip(images: Tensor, quality: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] after JPEG with 4:2:0 chroma subsampling at qualities int64 [N] from 1 to 100."""
    height, width = images.shape[1:3]
    margins = (0, -width % UNIT, 0, -height % UNIT)
    luminance, chrominance, to_ycbcr = _tables(images.device)
    planes = F.pad((images.float() @ to_ycbcr.T).permute(0, 3, 1, 2), margins, "replicate")  # [N, 3, H', W']
    y = _quantized(planes[:, :1].round() - 128, luminance[quality])
    half = _quantized(F.avg_pool2d(planes[:, 1:], 2).round(), chrominance[quality])
    chroma = F.interpolate(half.round().clamp(-128, 127), scale_factor=2, mode="bilinear")
    y, cb, cr = ((y.round() + 128).clamp(0, 255)[:, 0], *chroma.unbind(1))
    rgb = torch.stack((y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb), -1)
    return rgb[:, :height, :width].round().clamp(0, 255).to(torch.uint8)


def _quantized(planes: Tensor, table: Tensor) -> Tensor:
    """Planes [N, C, H, W] with the DCT coefficients of each block rounded to steps of its table [N, 8, 8]."""
    n, c, height, width = planes.shape
    blocks = planes.reshape(n, c, height // BLOCK, BLOCK, width // BLOCK, BLOCK).transpose(3, 4)
    dct = _dct(planes.device)
    steps = table[:, None, None, None]
    coefficients = (dct @ blocks @ dct.T / steps).round() * steps
    return (dct.T @ coefficients @ dct).transpose(3, 4).reshape(n, c, height, width)


@cache
def _dct(device: torch.device) -> Tensor:
    """The orthonormal DCT-II of 8 points as a matrix [8, 8]."""
    k, n = torch.arange(8.0)[:, None], torch.arange(8.0)[None]
    matrix = torch.cos((2 * n + 1) * k * torch.pi / 16) / 2
    matrix[0] = 8**-0.5
    return matrix.to(device)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Steps of luminance and of chrominance by quality, float32 [101, 8, 8], and RGB to YCbCr [3, 3]."""
    quality = torch.arange(101).clamp_min(1)[:, None, None]
    scale = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    steps = (((torch.tensor(base) * scale + 50) // 100).clamp(1, 255).float() for base in (LUMINANCE, CHROMINANCE))
    luminance, chrominance = (each.to(device) for each in steps)
    return luminance, chrominance, torch.tensor(TO_YCBCR).to(device)
