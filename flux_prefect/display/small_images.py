"""Small versions of images for people to look at: upright and in the colours that the image is meant to have."""

from __future__ import annotations

import io

from PIL import Image, ImageCms

from flux_prefect.api.client import MAX_PIXELS
from flux_prefect.api.images import open_image, read_orientation
from flux_prefect.errors import ImageTooLarge

__all__ = ["draw_small"]

_UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def draw_small(content: bytes, side: int) -> Image.Image:
    """Draw an image in sRGB with at most `side` pixels a side. Call it in a thread.

    Its EXIF orientation and its colour profile are applied, samples of 16 bits become 8, and transparent areas white.
    Takes about ten milliseconds for a JPEG of a megapixel, which is decoded at a fraction of its size.

    Raises:
        ImageTooLarge: it has more pixels than this package decodes.
        Exception: any error of Pillow for bytes that are not a complete image.
    """
    with open_image(content) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ImageTooLarge(f"{image.width} x {image.height} pixels are over the limit of {MAX_PIXELS:,}.")
        image.draft(None, (2 * side, 2 * side))  # of a JPEG: finer than needed, as it does not blend pixels well
        small = _in_plain_mode(image)
        small.thumbnail((side, side))
        opaque = Image.new("RGB", small.size, "white")
        has_alpha = small.mode in {"LA", "RGBA"}
        opaque.paste(_in_srgb(small, image.info.get("icc_profile")), mask=small.getchannel("A") if has_alpha else None)
        turn = _UPRIGHT.get(read_orientation(image))
    return opaque if turn is None else opaque.transpose(turn)


def _in_plain_mode(image: Image.Image) -> Image.Image:
    """A copy in a mode that can be scaled well: L, LA, RGB, RGBA or CMYK."""
    if image.mode.startswith("I"):  # 16 bits a sample, which Pillow would clip at 255
        return image.convert("I").point(lambda sample: sample * (1 / 256)).convert("L")
    if image.has_transparency_data:
        return image.convert("LA" if image.mode == "LA" else "RGBA")
    return image.convert({"1": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB"))


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image in sRGB, without its transparency. A profile that does not fit it is ignored, as browsers do."""
    plain = image.convert({"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode))
    if profile:
        try:
            theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            found = ImageCms.profileToProfile(plain, theirs, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass
        else:
            return plain.convert("RGB") if found is None else found
    return plain.convert("RGB")
