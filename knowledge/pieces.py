"""How an article's sections are cut into passages: by words, or as the authors' rollouts show."""

import re
from collections.abc import Callable

from data import DataError


def splitter(rule: str) -> Callable:
    """The function (title, [(heading, text)]) → [(heading, passage)] of a rule.

    words:N: whole sentences, at most N words with the title.
    chars:SIZE:OVERLAP: at most SIZE characters, of which OVERLAP also end the passage before; the
    pieces in the authors' published rollouts look like 800 and 200. Raises DataError.
    """
    words = re.fullmatch(r"words:(\d+)", rule)
    characters = re.fullmatch(r"chars:(\d+):(\d+)", rule)
    if words and int(words[1]) > 0:
        return lambda title, sections: by_words(title, sections, int(words[1]))
    if characters and int(characters[1]) > int(characters[2]):
        size, overlap = map(int, characters.groups())
        return lambda title, sections: by_characters(sections, size, overlap)
    raise DataError(
        f"--passages {rule}: neither words:N, as words:100, nor chars:SIZE:OVERLAP with the larger "
        "number first, as chars:800:200"
    )


def by_words(title: str, fields, max_words: int) -> list[tuple[str, str]]:
    """Cut an article into [(field, text)]; text is "Field: piece".

    fields: [(field, value)]; a field without a name gives its pieces alone. A piece is as many
    sentences as fit: title and text together have at most `max_words` words.

    >>> climate = ("Climate", "tropical in south. Desert in north.")
    >>> for field, text in by_words("Chad", [climate, ("", "Flat.")], max_words=5): print(text)
    Climate: tropical in south.
    Climate: Desert in north.
    Flat.
    """
    out = []
    for field, value in fields:
        head = f"{field}: " if field else ""
        room = max(1, max_words - len(f"{title} {head}".split()))
        piece = []
        for sentence in re.split(r"(?<=[.;!?])\s+", value):
            words = sentence.split()
            if piece and len(piece) + len(words) > room:
                out.append((field, head + " ".join(piece)))
                piece = []
            while len(words) > room:  # a sentence longer than a passage is cut
                out.append((field, head + " ".join(words[:room])))
                words = words[room:]
            piece += words
        if piece:
            out.append((field, head + " ".join(piece)))
    return out


def by_characters(sections, size: int, overlap: int) -> list[tuple[str, str]]:
    """Each section, "Heading: text", in pieces."""
    out = []
    for heading, text in sections:
        whole = " ".join(f"{heading}: {text}".split() if heading else text.split())
        out += [(heading, piece) for piece in overlapping(whole, size, overlap)]
    return out


def overlapping(text: str, size: int, overlap: int) -> list[str]:
    """Pieces of at most `size` characters. The next one begins `overlap` before the end of one.

    Both ends are moved to the nearest space before (an end) or behind (a beginning), where there is
    one.

    >>> overlapping("one two three four five six", size=14, overlap=5)
    ['one two three', 'three four', 'four five six']
    """
    pieces = []
    start = 0
    while True:
        end = start + size
        if end < len(text):
            space = text.rfind(" ", start + overlap + 1, end + 1)
            end = space if space > 0 else end
        if text[start:end].strip():
            pieces.append(text[start:end].strip())
        if end >= len(text):
            return pieces
        space = text.find(" ", end - overlap, end)
        start = space + 1 if space >= 0 else end - overlap
