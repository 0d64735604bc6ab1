"""One image: from a file, a Pillow image or an array of any kind to (C, H, W) uint8."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from autoslim.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pbm", ".pnm")
)
CHANNELS = (1, 3, 4)

_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # what the suffixes above may hold
_WHOLE = 4  # a crop of 8 % of the area, the least that is usual, then still has as many pixels as it is resized to


class BrokenImage(Exception):
    """An image that cannot be decoded; the text is the reason, in one line."""


@dataclass(frozen=True)
class Frame:
    """What is made of an image: its centre square resized to `size` (None: as it is), of `channels` (None: as it has).

    `share` of the shorter side is the side of that square. With `whole` the image is left whole, for a random crop to
    `size` that follows.
    """

    size: int | None = None
    channels: int | None = None
    share: float = 1.0
    whole: bool = False


def load_pillow() -> None:
    """Make Pillow ready for several threads; `DataError` naming the extra if it is missing."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("images in files need Pillow: pip install 'autoslim[vision]'") from error
    Image.init()  # here, since several threads must not do it at once


def decoded(file: str | IO[bytes], frame: Frame) -> torch.Tensor:
    """An image file, upright, in RGB or in `frame.channels`; `BrokenImage` with the reason if it cannot be decoded."""
    from PIL import Image

    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with Image.open(file, formats=formats) as image:
            return _framed(image, frame)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error ...
        reason = "not an image that Pillow knows" if type(error).__name__ == "UnidentifiedImageError" else ""
        raise BrokenImage(reason or first_line(error)) from error


def _framed(image: Image.Image, frame: Frame) -> torch.Tensor:
    from PIL import Image, ImageOps

    if frame.size is not None:  # JPEG: decode no more pixels than can be used
        used = (_WHOLE if frame.whole else 2 / frame.share) * frame.size
        image.draft(None, (round(used), round(used)))
    image = rgb(ImageOps.exif_transpose(image))
    if frame.channels == 1:
        image = image.convert("L")
    if frame.size is not None and not frame.whole:
        size, border = (frame.size, frame.size), (1 - frame.share) / 2
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR, bleed=border)  # antialiased
    array = np.array(image)
    tensor = torch.from_numpy(array)
    return tensor[None] if array.ndim == 2 else tensor.permute(2, 0, 1)


def rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode in RGB: transparent parts white, 16 bits by their upper 8."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, under the names I, I;16, I;16B ...
        values = np.asarray(image)
        if values.size and not 0 <= int(values.min()) <= int(values.max()) <= 65535:
            raise ValueError("whole-number pixels beyond 16 bits have no known range; save it with 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


def as_tensor(image: Any) -> torch.Tensor:
    """An image a user's data set gave, as (C, H, W) uint8; `ValueError` if that is not possible."""
    is_tensor = isinstance(image, torch.Tensor)
    if hasattr(image, "getbands"):  # a Pillow image, without importing Pillow
        image = image.convert("L") if image.mode in ("1", "L") else rgb(image)
    try:
        array = np.asarray(image.detach().cpu() if is_tensor else image)
    except (TypeError, RuntimeError) as error:  # a tensor without values, sparse, or of a type that numpy lacks
        kind = f"a tensor of {image.dtype} on {image.device}" if is_tensor else type(image).__name__
        raise ValueError(f"the image, {kind}, cannot become an array of uint8: {first_line(error)}") from error
    if array.dtype != np.uint8:
        hint = " (leave out ToTensor and Normalize)" if array.dtype.kind == "f" else ""
        raise ValueError(f"the image is {array.dtype}; it must be uint8, 0 to 255{hint}")
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[2] in CHANNELS and not (is_tensor and array.shape[0] in CHANNELS):
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] not in CHANNELS or not array.size:
        raise ValueError(
            f"the image has shape {array.shape}; it must be (H, W), (H, W, C) or (C, H, W) with C 1, 3 or 4"
        )
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def framed(images: torch.Tensor, frame: Frame) -> torch.Tensor:
    """Decoded images (N, C, H, W) in a frame."""
    images = with_channels(images, frame.channels)
    if frame.size is None or frame.whole:
        return images
    count, channels, height, width = images.shape
    side = max(1, round(frame.share * min(height, width)))
    if (height, width, side) == (frame.size,) * 3:
        return images
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, :, top : top + side, left : left + side]
    fitted = torch.empty(count, channels, frame.size, frame.size, dtype=torch.uint8)
    for start in range(0, count, 256):  # a whole set in float32 could exceed the memory
        block = images[start : start + 256].float()
        resized = F.interpolate(block, fitted.shape[2:], mode="bilinear", antialias=True, align_corners=False)
        fitted[start : start + 256] = resized.round_().clamp_(0, 255)
    return fitted


def with_channels(images: torch.Tensor, channels: int | None) -> torch.Tensor:
    """Images (N, C, H, W) of 1 or 3 channels: grey ones repeated, colours as their luminance; alpha over white."""
    if channels is None or images.shape[1] == channels:
        return images
    if images.shape[1] == 4:
        colours, alpha = images[:, :3].float(), images[:, 3:].float() / 255
        images = (colours * alpha + 255 * (1 - alpha)).round_().to(torch.uint8)
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous() if images.shape[1] == 1 else images
    return luminance(images.float()).round_().to(torch.uint8) if images.shape[1] == 3 else images


def luminance(images: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) float to (N, 1, H, W): weighted for colours (ITU-R 601), else the mean of the channels."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return (images * torch.tensor([0.299, 0.587, 0.114], device=images.device).view(3, 1, 1)).sum(1, keepdim=True)


def shape_text(shape: Iterable[int]) -> str:
    """(C, H, W) in words."""
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
