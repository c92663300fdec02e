"""The atlas's pictures: reading them out of the packages they come in, and disturbing them.

Flags out of the colour-emoji font and photographs out of Qt resource archives need a few lines each. The disturbances
(`augment`, `wave`) make the pictures that questions are asked about, and the views on which the image head is fitted.
"""

import io
import math
import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

ISO_FLAGS = Path("/usr/share/iso-flags-png-320x240")
KGEOGRAPHY = Path("/usr/share/kgeography")
NOTO = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
GCOMPRIS = Path("/usr/share/gcompris-qt/rcc")
DEBIAN = {
    "iso-flags-png-320x240": ISO_FLAGS,
    "kgeography-data": KGEOGRAPHY,
    "fonts-noto-color-emoji": NOTO,
    "gcompris-qt-data": GCOMPRIS,
}


def rcc_files(path: Path) -> dict[str, bytes]:
    """Every file inside a Qt resource archive (.rcc, format 1-3): {path: bytes}."""
    import zstandard

    data = path.read_bytes()
    if data[:4] != b"qres":
        raise ValueError(f"{path} is not a Qt resource file")
    version, tree, payload, names = struct.unpack(">IIII", data[4:20])
    size, files = (22 if version >= 2 else 14), {}

    def walk(node, prefix):
        at = tree + node * size
        name_at, flags = struct.unpack(">IH", data[at : at + 6])
        if node:
            length = struct.unpack(">H", data[names + name_at : names + name_at + 2])[0]
            prefix += "/" + data[names + name_at + 6 : names + name_at + 6 + 2 * length].decode(
                "utf-16-be"
            )
        if flags & 2:  # a folder
            count, first = struct.unpack(">II", data[at + 6 : at + 14])
            for child in range(first, first + count):
                walk(child, prefix)
        else:
            start = payload + struct.unpack(">I", data[at + 10 : at + 14])[0]
            body = data[start + 4 : start + 4 + struct.unpack(">I", data[start : start + 4])[0]]
            files[prefix] = (
                zlib.decompress(body[4:])
                if flags & 1
                else zstandard.ZstdDecompressor().decompress(body, max_output_size=1 << 28)
                if flags & 4
                else body
            )

    walk(0, "")
    return files


def waved_flags() -> dict[str, bytes]:
    """{two-letter code: PNG} out of the bitmaps of the Noto colour emoji font."""
    from fontTools.ttLib import TTFont

    font = TTFont(NOTO)
    glyphs = font.getBestCmap()
    letter = {glyphs[0x1F1E6 + i]: chr(97 + i) for i in range(26) if 0x1F1E6 + i in glyphs}
    strike, flags = font["CBDT"].strikeData[0], {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            for first, ligatures in getattr(
                getattr(table, "ExtSubTable", table), "ligatures", {}
            ).items():
                for ligature in ligatures:
                    if (
                        first in letter
                        and len(ligature.Component) == 1
                        and ligature.Component[0] in letter
                        and ligature.LigGlyph in strike
                    ):
                        flags[letter[first] + letter[ligature.Component[0]]] = strike[
                            ligature.LigGlyph
                        ].imageData
    return flags


def trimmed(source) -> Image.Image:
    """A picture as RGB, its transparent border cut away and what shows through painted white."""
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
    image = image.crop(box) if box else image
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """A strongly disturbed 224×224 picture: crop to 55–95% of the area, perspective 0.25, turn ±20°,
    brightness, contrast, colour and hue, blur and noise, a random colour where the picture ends."""
    from torchvision.transforms import functional as T

    w, h = image.size
    area, ratio = rng.uniform(0.55, 0.95), rng.uniform(0.8, 1.25)
    cw, ch = min(w, int(w * math.sqrt(area * ratio))), min(h, int(h * math.sqrt(area / ratio)))
    x, y = rng.randint(0, w - cw), rng.randint(0, h - ch)
    image = image.crop((x, y, x + cw, y + ch)).resize((224, 224), Image.BICUBIC)
    fill = [rng.randint(0, 255) for _ in range(3)]
    corners = [(0, 0), (223, 0), (223, 223), (0, 223)]
    moved = [
        (
            int(cx + (1 if cx == 0 else -1) * rng.uniform(0, 28)),
            int(cy + (1 if cy == 0 else -1) * rng.uniform(0, 28)),
        )
        for cx, cy in corners
    ]
    image = T.rotate(
        T.perspective(image, corners, moved, fill=fill), rng.uniform(-20, 20), fill=fill
    )
    image = T.adjust_contrast(
        T.adjust_brightness(image, rng.uniform(0.6, 1.4)), rng.uniform(0.6, 1.4)
    )
    image = T.adjust_hue(
        T.adjust_saturation(image, rng.uniform(0.5, 1.5)), rng.uniform(-0.04, 0.04)
    )
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2))), dtype=np.float32)
    noise = np.random.default_rng(rng.randint(0, 1 << 30)).normal(size=pixels.shape) * rng.uniform(
        0, 12
    )
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def wave(image: Image.Image, rng: random.Random) -> Image.Image:
    """The picture as a cloth in the wind: columns shifted along a sine, shaded on its slopes, on white."""
    pixels = np.pad(
        np.asarray(image.resize((224, 168))), ((24, 24), (0, 0), (0, 0)), constant_values=255
    )
    x, rows = np.arange(224), np.arange(len(pixels))[:, None]
    phase = 2 * math.pi * x / (rng.uniform(0.7, 1.6) * 224) + rng.uniform(0, 2 * math.pi)
    shift = np.round(rng.uniform(4, 16) * np.sin(phase)).astype(int)
    shaded = (
        pixels[(rows - shift) % len(pixels), x]
        * (1 + rng.uniform(0, 0.25) * np.cos(phase))[:, None]
    )
    return Image.fromarray(shaded[8:-8].clip(0, 255).astype(np.uint8))


def disturb_all(disturb, images: list[Image.Image], seed: int) -> list[Image.Image]:
    """disturb(image, rng) of each image, the same for the same seed; Pillow works outside the interpreter's lock."""
    with ThreadPoolExecutor() as pool:
        return list(
            pool.map(disturb, images, [random.Random(f"{seed} {i}") for i in range(len(images))])
        )
