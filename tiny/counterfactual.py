"""Counterfactual worlds: the real articles, with every name and number replaced by another.

A small policy taught with real facts recites them instead of reading, and RL then makes it worse on
what it has not seen. In a world where the capital of Peru is Odessa and the Nile is 12.4 m long,
what was retrieved is the only source of truth, and an answer can only be copied.
"""

import random
import re
from functools import cache

from mmhops.build import Graph

# A number that stands alone, "1,234.5"; or the two letters of an internet country code, ".td".
NUMBER = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?![\w])|(?<=\.)[a-z]{2}(?!\w)")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
YEARS = (1500, 2030)  # a number of four digits between them is read as a year


class Names:
    """Every name of the knowledge base by kind, and texts cut at names and numbers.

    kind: {name: kind}, of an entity its kind, of an attribute's text the attribute. pools: {kind:
    names}. words: all words of all names, sorted.
    """

    def __init__(self, graph: Graph):
        self.kind = {}
        for entity in graph.entities.values():
            for attribute_name, attribute in entity["attributes"].items():
                text = attribute["text"]
                if (
                    attribute["type"] == "String"
                    and len(text) > 3
                    and not re.search(r"\d|UTC", text)  # time zones
                ):
                    self.kind.setdefault(text, attribute_name)
        self.kind |= {entity["title"]: entity["kind"] for entity in graph.entities.values()}
        self.pools = {}
        for name, kind in self.kind.items():
            self.pools.setdefault(kind, []).append(name)
        self.words = sorted({word for name in self.kind for word in re.findall(r"\w[\w'-]+", name)})

        longest_first = sorted(self.kind, key=len, reverse=True)  # "South Sudan" before "Sudan"
        any_name = "|".join(re.escape(name) for name in longest_first)
        self.pattern = re.compile(rf"(?<!\w)(?:{any_name})(?!\w)|{NUMBER.pattern}")
        self.pieces = cache(self.cut)  # the same few passages are read again and again

    def cut(self, text: str) -> list[tuple[str, bool]]:
        """[(piece, is it a name or number)]; the pieces together are the text."""
        pieces, end = [], 0
        for match in self.pattern.finditer(text):
            pieces.append((text[end : match.start()], False))
            pieces.append((match.group(), True))
            end = match.end()
        pieces.append((text[end:], False))
        return pieces


class Counterfactual:
    """One world. Calling it rewrites a text, always in the same way.

    A name that the question, a query and three passages share is the same new name in all of them,
    and no two names become one. What replaces a name is drawn when the name is first met: the order
    in which texts are rewritten decides what `rng` draws.
    """

    def __init__(self, names: Names, rng: random.Random):
        self.names = names
        self.rng = rng
        self.map = {}  # {name or number: its replacement}
        self.used = set()  # replacements

    def __call__(self, text: str) -> str:
        return "".join(
            self.replace(piece) if is_slot else piece for piece, is_slot in self.names.pieces(text)
        )

    def replace(self, piece: str) -> str:
        if piece not in self.map:
            draw = self.name if piece in self.names.kind else self.number
            new = draw(piece)
            while new in self.used:
                new = draw(piece)
            self.map[piece] = new
            self.used.add(new)
        return self.map[piece]

    def name(self, name: str) -> str:
        """A name of the same kind; three times in ten a made-up one, which can only be copied."""
        rng = self.rng
        if rng.random() < 0.7:
            return rng.choice(self.names.pools[self.names.kind[name]])
        words = [rng.choice(self.names.words) for _ in range(rng.choice([1, 1, 2, 2, 3]))]
        if rng.random() < 0.5:
            other = rng.choice(self.names.words)
            beginning = words[-1][: rng.randint(2, 5)]
            end = other[-rng.randint(2, 5) :]
            words[-1] = beginning + end
        return " ".join(words)

    def number(self, number: str) -> str:
        """A number of about the same size in the same notation.

        A year for a year, mostly a day for a day, letters for a country code.
        """
        rng = self.rng
        if number.isalpha():
            return "".join(rng.choice(LETTERS) for _ in number)
        whole, point, decimals = number.replace(",", "").partition(".")
        if len(whole) == 4 and "," not in number and YEARS[0] <= int(whole) <= YEARS[1]:
            return str(rng.randint(*YEARS))
        if len(whole) <= 2 and not point and int(whole) <= 31 and rng.random() < 0.7:
            return str(rng.randint(1, 31))
        digits = max(1, len(whole) + rng.choice([-1, 0, 0, 1]))
        value = rng.randint(10 ** (digits - 1), 10**digits - 1)
        if not point:
            return f"{value:,}"
        return f"{value:,}." + "".join(str(rng.randint(0, 9)) for _ in decimals)
