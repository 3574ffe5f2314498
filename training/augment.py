"""Batched augmentation of uint8 images [N, H, W, 3]. All randomness comes from the generator passed in.

The generator is one of the CPU, so that the choices, and with them the pixels, are the same on every device. The pixels
stay on the device of the images; only JPEG by arithmetic (`training.jpeg`), on GPUs, differs from that of a CPU.

torchvision's transforms draw one set of parameters per call; these draw one per image, without a loop over images.
"""

import io

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from training import jpeg

PART = 1024  # images that are converted to another type at once


def pad(images: Tensor, margin: int) -> Tensor:
    """Reflection padding by `margin` pixels per side: [N, H, W, 3] to [N, H + 2m, W + 2m, 3]."""
    if margin == 0:
        return images
    count, height, width, channels = images.shape
    padded = images.new_empty(count, height + 2 * margin, width + 2 * margin, channels)
    # In parts: the whole set as float16 and padded would take five times the memory of the images.
    for part, target in zip(images.split(PART), padded.split(PART), strict=True):
        # Reflection is not implemented for uint8; float16 represents 0..255 exactly.
        as_float = part.permute(0, 3, 1, 2).half()  # F.pad pads the last two dimensions: [N, 3, H, W]
        target.copy_(F.pad(as_float, (margin,) * 4, "reflect").permute(0, 2, 3, 1))
    return padded


def mean_colour(images: Tensor) -> Tensor:
    """The rounded mean uint8 [3] of images uint8 [N, H, W, 3], in parts for the same reason."""
    total = torch.zeros(3, dtype=torch.int64, device=images.device)
    for part in images.split(PART):
        total += part.sum((0, 1, 2), dtype=torch.int64)
    return (total.double() / (images.numel() // 3)).round().to(torch.uint8)


def crop(padded: Tensor, index: Tensor, size: int, flipped: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of size x size of the images `index` int64 [B], flipped horizontally where the mask is true."""
    # One random offset per image, [B, 1]; adding the span gives pixel coordinates [B, size].
    top, left = (torch.randint(padded.shape[d] - size + 1, (len(index), 1), generator=generator) for d in (1, 2))
    index, top, left, flipped = (upload(each, padded.device) for each in (index, top, left, flipped))
    span = torch.arange(size, device=padded.device)  # [size]
    rows = top + span  # [B, size]
    # A flip reverses the column order, so crop and flip are a single gather.
    columns = left + torch.where(flipped[:, None], span.flip(0), span)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]  # [B, size, size, 3]


def alternate_flips(count: int, epoch: int, seed: int) -> Tensor:
    """Mask bool [count] of the images to flip: random in the first epoch, inverted in each following one.

    Each pair of epochs contains both views of every image (Jordan 2024, arXiv 2404.00498, section 3.6).
    """
    # The same generator in every epoch: the mask depends on seed and parity only, so a resumed run repeats it.
    first = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    return first ^ bool(epoch % 2)


def mixup(images: Tensor, partners: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Blends a random share of the images with up to half of their partner (Zhang et al. 2018, arXiv 1710.09412).

    Labels are not blended: an online teacher gives the targets of what the blend shows.
    """
    weight = torch.rand(len(images), generator=generator) / 2  # at most 1/2: the label stays the larger part
    weight[torch.rand(len(images), generator=generator) >= share] = 0
    weight = upload(weight, images.device)
    return torch.lerp(images.float(), partners.float(), weight[:, None, None, None]).round().to(torch.uint8)


def cutout(images: Tensor, side: int, fill: Tensor, generator: torch.Generator) -> Tensor:
    """Fills a random square of side x side in each image with `fill` uint8 [3] (DeVries & Taylor 2017, 1708.04552)."""
    if side == 0:
        return images
    n, height, width, _ = images.shape
    # The square lies inside the image, unlike in the paper: every image loses the same area.
    top = torch.randint(height - side + 1, (n, 1), generator=generator)
    left = torch.randint(width - side + 1, (n, 1), generator=generator)
    top, left = upload(top, images.device), upload(left, images.device)
    rows, columns = (torch.arange(each, device=images.device) for each in (height, width))  # compared with [N, 1]
    inside_rows = (rows >= top) & (rows < top + side)  # [N, H]
    inside_columns = (columns >= left) & (columns < left + side)  # [N, W]
    covered = inside_rows[:, :, None] & inside_columns[:, None, :]  # [N, H, W]
    return torch.where(covered[..., None], fill, images)


def random_jpeg(images: Tensor, share: float, quality: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Compresses a random share of the images as JPEG, 4:2:0, of a random quality from the inclusive range."""
    if share == 0:
        return images
    # Independent per image rather than a fixed number per batch, so that batches of any size have the same share.
    chosen = torch.nonzero(torch.rand(len(images), generator=generator) < share).flatten()
    qualities = torch.randint(quality[0], quality[1] + 1, (len(chosen),), generator=generator)
    out = images.clone()  # the padded training set must stay clean for later epochs
    if images.device.type == "cuda":
        place = upload(chosen, images.device)
        out[place] = jpeg.roundtrip(images[place], upload(qualities, images.device))
        return out
    for i, q in zip(chosen.tolist(), qualities.tolist(), strict=True):
        out[i] = lossy_roundtrip(images[i], q)
    return out


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device; to a GPU without waiting for what it computes."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def lossy_roundtrip_batch(images: Tensor, quality: int, image_format: str = "JPEG") -> Tensor:
    """`lossy_roundtrip` of every image uint8 [N, H, W, 3]."""
    return torch.stack([lossy_roundtrip(image, quality, image_format) for image in images])


def lossy_roundtrip(image: Tensor, quality: int, image_format: str = "JPEG") -> Tensor:
    """An image uint8 [H, W, 3] after encoding and decoding as JPEG or WEBP with 4:2:0 chroma subsampling."""
    buffer = io.BytesIO()
    # WEBP has no other subsampling and ignores the option.
    Image.fromarray(image.numpy()).save(buffer, image_format, quality=quality, subsampling="4:2:0")
    height, width, _ = image.shape
    # A bytearray, because frombuffer warns about memory that is not writable.
    return torch.frombuffer(bytearray(Image.open(buffer).tobytes()), dtype=torch.uint8).view(height, width, 3)
