"""The atlas's pictures: reading them out of the packages they come in, and disturbing them.

The disturbances (`augment`, `wave`) make pictures that questions are asked about, and the views on
which the image encoder's head is fitted.
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
    """Every file inside a Qt resource archive (.rcc, format 1-3): {path: bytes}.

    After a header come a tree of nodes of equal size, their names, and their contents.
    """
    data = path.read_bytes()
    if data[:4] != b"qres":
        raise ValueError(f"{path} is not a Qt resource file")
    version, tree, payload, names = struct.unpack(">IIII", data[4:20])
    node_size = 22 if version >= 2 else 14
    files = {}

    def walk(node: int, prefix: str):
        at = tree + node * node_size
        name_at, flags = struct.unpack(">IH", data[at : at + 6])
        if node:  # the root has no name
            prefix += "/" + name_of(names + name_at)
        if flags & 2:  # a folder
            count, first = struct.unpack(">II", data[at + 6 : at + 14])
            for child in range(first, first + count):
                walk(child, prefix)
        else:
            (offset,) = struct.unpack(">I", data[at + 10 : at + 14])
            files[prefix] = unpacked(payload + offset, flags)

    def name_of(at: int) -> str:  # length, hash, UTF-16
        (length,) = struct.unpack(">H", data[at : at + 2])
        return data[at + 6 : at + 6 + 2 * length].decode("utf-16-be")

    def unpacked(at: int, flags: int) -> bytes:
        (size,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 4 + size]
        if flags & 1:
            return zlib.decompress(body[4:])  # behind its size
        if flags & 4:
            import zstandard

            return zstandard.ZstdDecompressor().decompress(body, max_output_size=1 << 28)
        return body

    walk(0, "")
    return files


def waved_flags() -> dict[str, bytes]:
    """{two-letter code: PNG} out of the bitmaps of the Noto colour emoji font.

    The font has 26 glyphs for letters and writes two of them, say F and R, as one ligature: a flag.
    """
    from fontTools.ttLib import TTFont

    font = TTFont(NOTO)
    glyphs = font.getBestCmap()
    letter = {glyphs[0x1F1E6 + i]: chr(97 + i) for i in range(26) if 0x1F1E6 + i in glyphs}
    bitmaps = font["CBDT"].strikeData[0]
    flags = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    parts = [first, *ligature.Component]
                    of_letters = len(parts) == 2 and all(part in letter for part in parts)
                    if of_letters and ligature.LigGlyph in bitmaps:
                        code = letter[parts[0]] + letter[parts[1]]
                        flags[code] = bitmaps[ligature.LigGlyph].imageData
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
    """A strongly disturbed 224×224 picture; a random colour fills what the picture leaves free."""
    from torchvision.transforms import functional as T

    # 1) Crop to 55–95% of the area, nearly square, and resize.
    w, h = image.size
    area = rng.uniform(0.55, 0.95)
    ratio = rng.uniform(0.8, 1.25)
    cw = min(w, int(w * math.sqrt(area * ratio)))
    ch = min(h, int(h * math.sqrt(area / ratio)))
    x = rng.randint(0, w - cw)
    y = rng.randint(0, h - ch)
    image = image.crop((x, y, x + cw, y + ch)).resize((224, 224), Image.BICUBIC)

    # 2) Perspective: every corner moves inwards by up to 28 pixels. Then turn by up to 20°.
    fill = [rng.randint(0, 255) for _ in range(3)]
    corners = [(0, 0), (223, 0), (223, 223), (0, 223)]
    moved = []
    for cx, cy in corners:
        right = 1 if cx == 0 else -1
        down = 1 if cy == 0 else -1
        moved.append((int(cx + right * rng.uniform(0, 28)), int(cy + down * rng.uniform(0, 28))))
    image = T.perspective(image, corners, moved, fill=fill)
    image = T.rotate(image, rng.uniform(-20, 20), fill=fill)

    # 3) Brightness, contrast, colour, hue.
    image = T.adjust_brightness(image, rng.uniform(0.6, 1.4))
    image = T.adjust_contrast(image, rng.uniform(0.6, 1.4))
    image = T.adjust_saturation(image, rng.uniform(0.5, 1.5))
    image = T.adjust_hue(image, rng.uniform(-0.04, 0.04))

    # 4) Blur and noise.
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2)))
    pixels = np.asarray(image, dtype=np.float32)  # (224, 224, 3)
    noise = np.random.default_rng(rng.randint(0, 1 << 30)).normal(size=pixels.shape)
    pixels = pixels + noise * rng.uniform(0, 12)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def wave(image: Image.Image, rng: random.Random) -> Image.Image:
    """The picture as a cloth in the wind: columns shifted along a sine, shaded on its slopes."""
    pixels = np.asarray(image.resize((224, 168)))  # (168, 224, 3)
    pixels = np.pad(pixels, ((24, 24), (0, 0), (0, 0)), constant_values=255)  # (216, 224, 3)
    height = len(pixels)
    x = np.arange(224)
    y = np.arange(height)[:, None]
    phase = 2 * math.pi * x / (rng.uniform(0.7, 1.6) * 224) + rng.uniform(0, 2 * math.pi)
    shift = np.round(rng.uniform(4, 16) * np.sin(phase)).astype(int)
    shade = 1 + rng.uniform(0, 0.25) * np.cos(phase)
    waved = pixels[(y - shift) % height, x] * shade[:, None]
    return Image.fromarray(waved[8:-8].clip(0, 255).astype(np.uint8))


def disturb_all(disturb, images: list[Image.Image], seed: int) -> list[Image.Image]:
    """disturb(image, rng) of each image, the same for the same seed."""
    rngs = [random.Random(f"{seed} {i}") for i in range(len(images))]
    with ThreadPoolExecutor() as pool:  # Pillow works outside the interpreter's lock
        return list(pool.map(disturb, images, rngs))
