"""Batched augmentation of uint8 images [N, H, W, 3]; every random choice comes from the generator handed in."""

import io

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def pad(images: Tensor, margin: int) -> Tensor:
    """Mirrors `margin` pixels outwards on each side: [N, H, W, 3] to [N, H + 2m, W + 2m, 3]."""
    if margin == 0:
        return images
    as_float = images.permute(0, 3, 1, 2).half()  # reflection is not implemented for uint8; halves hold 0..255 exactly
    return F.pad(as_float, (margin,) * 4, "reflect").to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def crop(padded: Tensor, index: Tensor, size: int, mirrored: Tensor, generator: torch.Generator) -> Tensor:
    """Images `index` of the padded set, each cut at a random place to size x size, mirrored where the mask says."""
    span = torch.arange(size)
    top, left = (torch.randint(padded.shape[d] - size + 1, (len(index), 1), generator=generator) for d in (1, 2))
    rows = top + span
    columns = left + torch.where(mirrored[:, None], span.flip(0), span)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def alternate_flips(count: int, epoch: int, seed: int) -> Tensor:
    """Which of `count` images to mirror: at random in the first epoch, then the other way in every next one.

    Each pair of epochs shows both views of every image (Jordan 2024, arXiv 2404.00498, section 3.6).
    """
    first = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    return first ^ bool(epoch % 2)


def blend(images: Tensor, others: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Mixes up to a half of another image into a random share of the images (Zhang et al. 2018, arXiv 1710.09412)."""
    part = torch.rand(len(images), generator=generator) / 2
    part[torch.rand(len(images), generator=generator) >= share] = 0
    return torch.lerp(images.float(), others.float(), part[:, None, None, None]).round().to(torch.uint8)


def cutout(images: Tensor, side: int, fill: Tensor, generator: torch.Generator) -> Tensor:
    """Covers a square of side x side inside each image with the colour `fill` (DeVries & Taylor 2017)."""
    if side == 0:
        return images
    n, height, width, _ = images.shape
    top = torch.randint(height - side + 1, (n, 1), generator=generator)
    left = torch.randint(width - side + 1, (n, 1), generator=generator)
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows = (rows >= top) & (rows < top + side)
    inside_columns = (columns >= left) & (columns < left + side)
    covered = inside_rows[:, :, None] & inside_columns[:, None, :]
    return torch.where(covered[..., None], fill, images)


def recompress(images: Tensor, share: float, quality: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Sends a random share of the images through JPEG (4:2:0) at a random quality from the inclusive range."""
    if share == 0:
        return images
    chosen = torch.nonzero(torch.rand(len(images), generator=generator) < share).flatten()
    qualities = torch.randint(quality[0], quality[1] + 1, (len(chosen),), generator=generator)
    out = images.clone()
    for i, q in zip(chosen.tolist(), qualities.tolist(), strict=True):
        out[i] = recode(images[i], q)
    return out


def recode_all(images: Tensor, quality: int, kind: str = "JPEG") -> Tensor:
    """Every image uint8 [N, H, W, 3] after `recode` at one quality."""
    return torch.stack([recode(image, quality, kind) for image in images])


def recode(image: Tensor, quality: int, kind: str = "JPEG") -> Tensor:
    """One image uint8 [H, W, 3] after a round trip through JPEG or WEBP with 4:2:0 chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, kind, quality=quality, subsampling="4:2:0")  # WEBP has no other
    height, width, _ = image.shape
    return torch.frombuffer(bytearray(Image.open(buffer).tobytes()), dtype=torch.uint8).view(height, width, 3)
