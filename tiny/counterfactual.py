"""Counterfactual worlds: the real articles, with every name and number replaced by another drawn at random.

A small policy taught with real facts recites them instead of reading, and RL then makes it worse on what it has not
seen. In a world where the capital of Peru is Odessa and the Nile is 12.4 m long, what was retrieved is the only source
of truth, and an answer can only be copied. The replacement is consistent within one world: a name that the question, a
query and three passages share is the same new name in all of them.
"""

import random
import re
from functools import cache

from mmhops.build import Graph as World

NUMBER = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?![\w])|(?<=\.)[a-z]{2}(?!\w)")


class Names:
    """Every name of the knowledge base by kind, and texts cut at them."""

    def __init__(self, world: World):
        self.kind = {}
        for entity in world.entities.values():
            for name, attribute in entity["attributes"].items():
                if (
                    attribute["type"] == "String"
                    and len(attribute["text"]) > 3
                    and not re.search(r"\d|UTC", attribute["text"])
                ):
                    self.kind.setdefault(attribute["text"], name)
        self.kind |= {entity["title"]: entity["kind"] for entity in world.entities.values()}
        self.pools = {}
        for name, kind in self.kind.items():
            self.pools.setdefault(kind, []).append(name)
        self.words = sorted({word for name in self.kind for word in re.findall(r"\w[\w'-]+", name)})
        names = "|".join(re.escape(name) for name in sorted(self.kind, key=len, reverse=True))
        pattern = re.compile(rf"(?<!\w)(?:{names})(?!\w)|{NUMBER.pattern}")

        @cache
        def pieces(text: str) -> tuple[tuple[str, bool], ...]:
            """[(piece, is it to be replaced)]"""
            out, end = [], 0
            for match in pattern.finditer(text):
                out += [(text[end : match.start()], False), (match.group(), True)]
                end = match.end()
            return *out, (text[end:], False)

        self.pieces = pieces


class Counterfactual:
    """One world in which every name and number is another. Calling it rewrites a text, always in the same way."""

    def __init__(self, names: Names, rng: random.Random):
        self.names, self.rng, self.map, self.used = names, rng, {}, set()

    def __call__(self, text: str) -> str:
        return "".join(
            self.replace(piece) if slot else piece for piece, slot in self.names.pieces(text)
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
        """A name of the same kind; three times in ten one that nobody has heard of, which can only be copied."""
        if self.rng.random() < 0.7:
            return self.rng.choice(self.names.pools[self.names.kind[name]])
        words = [self.rng.choice(self.names.words) for _ in range(self.rng.choice([1, 1, 2, 2, 3]))]
        if self.rng.random() < 0.5:  # the beginning of one word, the end of another
            other = self.rng.choice(self.names.words)
            words[-1] = words[-1][: self.rng.randint(2, 5)] + other[-self.rng.randint(2, 5) :]
        return " ".join(words)

    def number(self, number: str) -> str:
        """A number of about the same size in the same notation; a year for a year, letters for a country code."""
        rng = self.rng
        if number.isalpha():
            return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in number)
        whole, point, decimals = number.replace(",", "").partition(".")
        if len(whole) == 4 and "," not in number and 1500 <= int(whole) <= 2030:
            return str(rng.randint(1500, 2030))
        if len(whole) <= 2 and not point and int(whole) <= 31 and rng.random() < 0.7:
            return str(rng.randint(1, 31))
        digits = max(1, len(whole) + rng.choice([-1, 0, 0, 1]))
        value = rng.randint(10 ** (digits - 1), 10**digits - 1)
        return f"{value:,}" + (
            point + "".join(str(rng.randint(0, 9)) for _ in decimals) if point else ""
        )
