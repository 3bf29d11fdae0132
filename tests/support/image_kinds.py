"""Whole images of every kind that a service may deliver, made by Pillow: each shows the four corner colours upright."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image, ImageCms, PngImagePlugin

CORNERS = ((200, 40, 40), (40, 160, 60), (50, 60, 190), (230, 210, 60))
"""The colours of the upper left, upper right, lower left and lower right quarter."""

SIZE = (480, 272)  # shown; 16:9 as the service rounds it


def paint(size: tuple[int, int] = SIZE) -> Image.Image:
    """The image as it is to be shown."""
    image = Image.new("RGB", size)
    width, height = size[0] // 2, size[1] // 2
    for place, colour in enumerate(CORNERS):
        image.paste(colour, (place % 2 * width, place // 2 * height, size[0], size[1]))
    return image


def save(image: Image.Image, form: str, **options: object) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


_STORED = {  # by EXIF orientation: what turns the shown image into the stored one
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(orientation: int, form: str) -> bytes:
    """The image, stored in another orientation than it is shown."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = _STORED[orientation]
    stored = paint() if turn is None else paint().transpose(turn)
    return save(stored, form, exif=exif.tobytes(), **({"lossless": True} if form == "WEBP" else {}))


def red_is_blue_profile() -> bytes:
    """A colour profile in which red and blue are exchanged: it shows whether profiles are applied."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", profile, 128)[0]
    names = {bytes(profile[132 + 12 * tag : 136 + 12 * tag]): 132 + 12 * tag for tag in range(count)}
    profile[names[b"rXYZ"] : names[b"rXYZ"] + 4] = b"bXYZ"
    profile[names[b"bXYZ"] : names[b"bXYZ"] + 4] = b"rXYZ"
    return bytes(profile)


def with_profile(form: str) -> bytes:
    """The image with red and blue exchanged, and a profile that exchanges them again."""
    red, green, blue = paint().split()
    options = {"quality": 95, "subsampling": 0} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    return save(Image.merge("RGB", (blue, green, red)), form, icc_profile=red_is_blue_profile(), **options)


def with_provenance(form: str) -> bytes:
    """The image with a C2PA manifest store (JUMBF) and an XMP packet, where the standards put them."""
    box = struct.pack(">I4s", 40, b"jumb") + struct.pack(">I4s", 32, b"jumd") + b"c2pa" + bytes(20)
    xmp = b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"/><?xpacket end="w"?>'
    if form == "JPEG":
        data = save(paint(), form, quality=90)
        app11 = b"JP" + struct.pack(">HI", 1, 1) + box
        app1 = b"http://ns.adobe.com/xap/1.0/\0" + xmp
        segments = b"".join(
            marker + struct.pack(">H", len(content) + 2) + content
            for marker, content in ((b"\xff\xe1", app1), (b"\xff\xeb", app11))
        )
        return data[:2] + segments + data[2:]
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    data = save(paint(), form, pnginfo=info)
    chunk = struct.pack(">I", len(box)) + b"caBX" + box + struct.pack(">I", zlib.crc32(b"caBX" + box))
    return data[:33] + chunk + data[33:]


def _gray_16() -> bytes:
    return save(paint().convert("L").convert("I").point(lambda sample: sample * 257).convert("I;16"), "PNG")


def _transparent_palette() -> bytes:
    return save(paint().convert("P", palette=Image.Palette.ADAPTIVE, colors=8), "PNG", transparency=b"\xff" * 8)


KINDS: dict[str, bytes] = {
    "plain": save(paint(), "JPEG", quality=90),
    "progressive": save(paint(), "JPEG", quality=90, progressive=True),
    "grayscale": save(paint().convert("L"), "JPEG", quality=90),
    "CMYK": save(paint().convert("CMYK"), "JPEG", quality=95),
    "MPO": save(paint(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 64), "red")], quality=90),
    "turned": turned(6, "JPEG"),
    "turned PNG": turned(8, "PNG"),
    "profile": with_profile("JPEG"),
    "profile PNG": with_profile("PNG"),
    "provenance": with_provenance("JPEG"),
    "provenance PNG": with_provenance("PNG"),
    "palette": save(paint().convert("P", palette=Image.Palette.ADAPTIVE, colors=8), "PNG"),
    "transparent palette": _transparent_palette(),
    "16 bits": _gray_16(),
    "RGBA": save(paint().convert("RGBA"), "PNG"),
    "WEBP": save(paint(), "WEBP", lossless=True),
}
