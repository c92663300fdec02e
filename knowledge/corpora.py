"""Articles from the field's own sources, one at a time: a knowledge base may be larger than memory.

    evqa      encyclopedic_kb_wiki.json of Encyclopedic-VQA (15 GB, 2M articles)
    wiki6m    Wiki6M_ver_1_0.jsonl of OVEN / INFOSEEK, plain or .gz (6M articles)
    searchr1  a corpus.jsonl of passages, as Search-R1 has them
    markdown  a folder of .md files

Images of evqa and wiki6m are not in their files; they are looked for under a root folder.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from files.images import ImageFinder
from files.records import DataError, read_jsonl


@dataclass(frozen=True)
class Article:
    id: str
    title: str
    sections: list[tuple[str, str]]  # (heading, text); no heading: ""
    image: Path | None
    whole: bool = False  # its text is one passage already


def find_or_none(find: ImageFinder, name: str) -> Path | None:
    """The image of this id, or None where there is none, no id, or no root folder."""
    if find.root is None or not name:
        return None
    try:
        return find(name, "")
    except DataError:
        return None


def evqa_articles(path: Path, find: ImageFinder):
    """One JSON object: url → {"title", "section_titles", "section_texts", "image_urls"}.

    The article's image is called as its first image url ends.
    """
    import ijson

    with open(path, "rb") as file:
        try:
            for url, record in ijson.kvitems(file, ""):
                image_urls = record.get("image_urls") or [""]
                name = unquote(Path(urlsplit(image_urls[0]).path).stem)
                yield Article(
                    id=url,
                    title=record["title"],
                    sections=list(zip(record["section_titles"], record["section_texts"])),
                    image=find_or_none(find, name),
                )
        except (ijson.JSONError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{path} is not E-VQA's knowledge base ({reason})") from None


def wiki6m_articles(path: Path, find: ImageFinder):
    """Lines of {"wikidata_id", "wikipedia_title", "wikipedia_content", "wikipedia_summary"}.

    The image of Q421 is Q421.jpg, in the folder Q421[:4] as OVEN lays them out, or anywhere.
    """
    for number, record in read_jsonl(path):
        try:
            name = record["wikidata_id"]
            text = record.get("wikipedia_content") or record.get("wikipedia_summary") or ""
            image = find.root / name[:4] / f"{name}.jpg" if find.root else None
            if image is None or not image.exists():
                image = find_or_none(find, name)
            title = record["wikipedia_title"]
        except (KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{path}:{number}: no article of Wiki6M ({reason})") from None
        yield Article(id=name, title=title, sections=[("", text)], image=image)


def searchr1_passages(path: Path, find: ImageFinder):
    """Lines of {"id", "contents": "\\"title\\"\\ntext"}; passages are taken as they are."""
    for number, record in read_jsonl(path):
        if not isinstance(record, dict) or not isinstance(record.get("contents"), str):
            raise DataError(f'{path}:{number}: a passage has "contents", a string')
        title, _, text = record["contents"].partition("\n")
        yield Article(
            id=str(record.get("id", number)),
            title=title.strip().strip('"'),
            sections=[("", text)],
            image=None,
            whole=True,
        )


IMAGE = r"!\[[^\]]*\]\(([^)\s]*)[^)]*\)"  # ![text](file "title"), the file in a group
LINK = r"\[([^\]]*)\]\([^)]*\)"  # [text](url), the text in a group


def markdown_articles(path: Path, find: ImageFinder):
    """Files of "# Title" and sections under "##"; the image is the first one that is a file."""
    for file in sorted(path.rglob("*.md")):
        text = file.read_text(encoding="utf-8")
        title = file.stem
        if heading := re.search(r"^#\s+(.+)$", text, re.MULTILINE):
            title = heading.group(1).strip()
            text = text.replace(heading.group(), "", 1)
        images = [file.parent / unquote(name) for name in re.findall(IMAGE, text)]
        text = re.sub(IMAGE, "", text)
        text = re.sub(LINK, r"\1", text)
        first, *rest = re.split(r"^##+\s+(.+)$", text, flags=re.MULTILINE)
        sections = [("", first), *zip(rest[::2], rest[1::2])]
        yield Article(
            id=str(file.relative_to(path).with_suffix("")),
            title=title,
            sections=[(h.strip(), " ".join(t.split())) for h, t in sections if t.strip()],
            image=next((image for image in images if image.is_file()), None),
        )


SOURCES = {
    "evqa": evqa_articles,
    "wiki6m": wiki6m_articles,
    "searchr1": searchr1_passages,
    "markdown": markdown_articles,
}


def read_articles(source: str, path: Path, images: Path | None = None):
    """Yield the Articles of a source. images: the root folder of evqa's and wiki6m's.

    Raises DataError, naming the file and the line, where the source is not what it should be.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; --path names the {source} source")
    yield from SOURCES[source](path, ImageFinder(images))
