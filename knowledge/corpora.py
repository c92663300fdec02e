"""Articles from the field's own sources, one at a time: a knowledge base may be larger than memory.

- `evqa`      encyclopedic_kb_wiki.json of Encyclopedic-VQA: url → title, section titles and texts, image urls (15 GB, 2M articles)
- `wiki6m`    Wiki6M_ver_1_0.jsonl of OVEN / INFOSEEK, plain or .gz: wikidata_id, wikipedia_title, wikipedia_content (6M articles)
- `searchr1`  a corpus.jsonl of passages, as Search-R1 has them: {"id", "contents": "\\"title\\"\\ntext"}; taken as they are
- `markdown`  a folder of .md files: "# Title", sections under "##", the first picture that is a file is the article's image

Pictures of `evqa` and `wiki6m` are not in their files. They are looked for under an image root by the article's id: its
Wikidata id (`Q42/Q42.jpg`, as OVEN lays them out) or the file name at the end of its first image url.
"""

import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data import DataError, ImageFinder


@dataclass(frozen=True)
class Article:
    id: str
    title: str
    sections: list[tuple[str, str]]  # (heading, text); no heading: ""
    image: Path | None
    whole: bool = False  # its text is one passage already


def lines_of(path: Path):
    """(number, record) of a JSONL file, plain or gzipped."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: not JSON ({error})") from None


def find_or_none(find: ImageFinder, name: str) -> Path | None:
    try:
        return find(name, "") if find.root and name else None
    except DataError:
        return None


def evqa_articles(path: Path, find: ImageFinder):
    import ijson

    with open(path, "rb") as file:
        try:
            for url, record in ijson.kvitems(file, ""):
                pictures = record.get("image_urls") or [""]
                name = unquote(Path(urlsplit(pictures[0]).path).stem)
                yield Article(
                    url,
                    record["title"],
                    list(zip(record["section_titles"], record["section_texts"])),
                    find_or_none(find, name),
                )
        except (ijson.JSONError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not E-VQA's knowledge base ({type(error).__name__}: {error})"
            ) from None


def wiki6m_articles(path: Path, find: ImageFinder):
    for number, record in lines_of(path):
        try:
            name, text = (
                record["wikidata_id"],
                record.get("wikipedia_content") or record.get("wikipedia_summary") or "",
            )
            shown = find.root / name[:4] / f"{name}.jpg" if find.root else None
            yield Article(
                name,
                record["wikipedia_title"],
                [("", text)],
                shown if shown and shown.exists() else find_or_none(find, name),
            )
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: no article of Wiki6M ({type(error).__name__}: {error})"
            ) from None


def searchr1_passages(path: Path, find: ImageFinder):
    for number, record in lines_of(path):
        if not isinstance(record, dict) or not isinstance(record.get("contents"), str):
            raise DataError(f'{path}:{number}: a passage has "contents", a string')
        title, _, text = record["contents"].partition("\n")
        yield Article(
            str(record.get("id", number)), title.strip().strip('"'), [("", text)], None, whole=True
        )


def markdown_articles(path: Path, find: ImageFinder):
    for file in sorted(path.rglob("*.md")):
        text, title = file.read_text(encoding="utf-8"), file.stem
        if found := re.search(r"^#\s+(.+)$", text, re.MULTILINE):
            title, text = found.group(1).strip(), text.replace(found.group(), "", 1)
        pictures = [
            file.parent / unquote(name)
            for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)[^)]*\)", text)
        ]
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text))
        heads = re.split(r"^##+\s+(.+)$", text, flags=re.MULTILINE)
        sections = [("", heads[0])] + list(zip(heads[1::2], heads[2::2]))
        yield Article(
            str(file.relative_to(path).with_suffix("")),
            title,
            [(h.strip(), " ".join(t.split())) for h, t in sections if t.strip()],
            next((picture for picture in pictures if picture.is_file()), None),
        )


SOURCES = {
    "evqa": evqa_articles,
    "wiki6m": wiki6m_articles,
    "searchr1": searchr1_passages,
    "markdown": markdown_articles,
}


def read_articles(source: str, path: Path, images: Path | None = None):
    """Yield the Articles of a source. Raises DataError, naming the file and the line, where it is not what it should be."""
    if not path.exists():
        raise DataError(f"{path} does not exist; --path names the {source} source")
    yield from SOURCES[source](path, ImageFinder(images))
