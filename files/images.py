"""An image is a path or a PIL image: either has a key, pixels and bytes. And images by their id."""

import hashlib
import io
import json
import os
from pathlib import Path

from PIL import Image, ImageOps

from files.records import DataError

# How files of images begin, to name those that come without a name; and how their names may end.
SUFFIXES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif"}
PICTURES = {f".{suffix}" for suffix in (*SUFFIXES.values(), "jpeg", "bmp", "img")}


# What is opened. Of others Pillow may start a program (PostScript) or make something up.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
ORIENTATION = 0x0112  # of Exif
MOST_PIXELS = 100_000_000  # 300 MB as RGB; a small file may claim to have more


def open_image(image: Path | str | Image.Image | io.BytesIO) -> Image.Image:
    """The pixels as RGB: upright, on white, the first picture of several.

    Raises ValueError, naming the file, where it is missing, of another kind or too large.
    """
    if isinstance(image, Image.Image):
        return as_rgb(image)
    try:
        with Image.open(image, formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MOST_PIXELS:
                raise ValueError(f"{width} x {height} are more than {MOST_PIXELS:,} pixels")
            return as_rgb(opened)
    except Exception as error:
        raise ValueError(f"cannot read the image {image}: {error}") from error


def image_size(image: Path | str | Image.Image | io.BytesIO) -> tuple[int, int]:
    """(width, height), upright, by what the header says: no pixel is decoded.

    Raises ValueError, naming the file, where it is missing or of another kind.
    """
    if isinstance(image, Image.Image):
        return image.size
    try:
        with Image.open(image, formats=FORMATS) as opened:
            # Pillow would decode a PNG to look for Exif behind its pixels
            no_exif = opened.format == "PNG" and "exif" not in opened.info
            turned = not no_exif and opened.getexif().get(ORIENTATION, 1) >= 5  # by a quarter
            return opened.size[::-1] if turned else opened.size
    except Exception as error:
        raise ValueError(f"cannot read the image {image}: {error}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Sixteen bits become eight, a camera's rotation is applied, what shines through is white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; `convert` alone would cut it off at 255
        image = image.point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def image_key(image: Path | str | Image.Image) -> str:
    """Equal for equal images: a path's text, or size and SHA-256 of a PIL image's RGB pixels.

    >>> image_key(Path("flags/td.png"))
    'flags/td.png'
    >>> image_key(Image.new("RGB", (2, 1)))[:14]
    '2x1 b0f66adc83'
    """
    if not isinstance(image, Image.Image):
        return str(image)  # the file is not read only to name it
    pixels = image.convert("RGB").tobytes()
    return f"{image.width}x{image.height} {hashlib.sha256(pixels).hexdigest()}"


def image_bytes(image: Path | str | Image.Image) -> bytes:
    """The bytes of a file: those of the path, or of a PNG, which keeps every pixel."""
    if not isinstance(image, Image.Image):
        return Path(image).read_bytes()
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return file.getvalue()


def unpack(images: list[bytes], folder: Path) -> list[Path]:
    """Write a question's images into a folder, once; safe for several processes at a time.

    They are named by what they hold: a row's id may come twice, or lead out of the folder.
    """
    paths = []
    for data in images:
        name = hashlib.sha256(data).hexdigest()[:24]
        path = folder / f"{name}.{SUFFIXES.get(data[:2], 'img')}"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}")
            part.write_bytes(data)
            os.replace(part, path)
        paths.append(path)
    return paths


class ImageFinder:
    """Image files of a root folder by id: where they usually lie, else anywhere under the root."""

    def __init__(self, root: Path | None):
        self.root = Path(root) if root else None
        self.index = None  # id → file, made when an image is not where it usually lies

    def __call__(self, name: str, where: str) -> Path:
        """The file of an image. Raises DataError, beginning with `where`, when there is none."""
        if self.root is None:
            raise DataError(
                f"{where}: the question shows image {name}; "
                "say where such images are with --images FOLDER"
            )
        # Google Landmarks lays its images out by the first three letters of their ids.
        landmark = f"{name[:1]}/{name[1:2]}/{name[2:3]}/{name}.jpg"
        for guess in (f"{name}.jpg", f"{name}.JPEG", f"{name}.png", landmark):
            if (self.root / guess).exists():
                return self.root / guess
        if self.index is None:
            self.index = self.walk()
        if name not in self.index or not self.index[name].exists():
            raise DataError(f"{where}: image {name} is not under {self.root}")
        return self.index[name]

    def walk(self) -> dict[str, Path]:
        """{id: file} of everything under the root; takes a while, and is done at most once."""
        index = {}
        for folder, _, files in os.walk(self.root):
            for file in map(Path, files):
                if file.suffix.lower() in PICTURES:  # some lie beside a text of the same name
                    index[file.stem] = Path(folder, file)
        for table in self.root.glob("*id2name.json"):  # E-VQA's own, of iNaturalist's numbers
            for number, file in json.loads(table.read_text()).items():
                index[number] = self.root / file
        return index
