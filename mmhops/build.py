"""Build multimodal multi-hop questions from a knowledge base's own relations (the paper's §3, MMhops).

    python -m mmhops.build --kb data/kb --out data/mmhops

**Bridge**, by iterative expansion. Start from a picture of an entity, "the country whose flag is shown in the image".
Each expansion replaces the entity by a description through one of its relations, "the largest export partner of
<the country whose flag …>"; the last asks for an attribute, "What is the capital of <…>?". A chain of n steps takes
n tool calls: one image search, then a text search a step.

**Compare**, from pairs of entities that share a quantity, whose names are replaced by their pictures: "Which of the two
countries whose flags are shown has the larger population?". The answer is a name, never "the first", so that nothing
can be guessed before searching. It takes four calls: two image searches, two text searches. `--numeric-compare 0.8` asks
mostly for numbers instead, as the paper does (a difference, a ratio, the years between), `--similar 10` pairs an entity with
one of its ten nearest. A million-parameter policy cannot do arithmetic, so the default questions have neither.

The picture in a question is never the knowledge base's own file: another drawing, another photograph, or an augmented
one. Splits are by *start entity*: nothing pictured in a test question is pictured in training. The entities further
down a chain do recur (there are only so many countries), and how often is printed.
"""

import json
import random
import re
import shutil
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import write_jsonl
from retrieval import IMAGE_CORPUS, TEXT_CORPUS, TEXT_INDEX, open_image

SIZES = {"train": 6600, "validation": 500, "test": 1000}
SHARES = {"validation": 0.1, "test": 0.2}  # of the start entities; the rest are for training
ROWS = {("Bridge", 3): 0.42, ("Bridge", 4): 0.28, ("Bridge", 2): 0.15, ("Compare", 4): 0.15}
PHOTO_WEIGHTS = {"augmented": 1.0, "waved": 1.0, "glossy": 0.5, "photograph": 1.0}

START = {
    "country": [
        "the country whose flag is shown in the image",
        "the country with the flag in this picture",
        "the country this flag belongs to",
    ],
    "region": [
        "the region whose flag is shown in the image",
        "the region with the flag in this picture",
    ],
    "monument": ["the monument in the image", "the landmark shown in this picture"],
}
# A relation as a noun phrase around the entity it starts from.
RELATIONS = {
    "longest border": [
        "the country that shares the longest land border with {}",
        "the neighbor with the longest border with {}",
    ],
    "largest export partner": [
        "the largest export partner of {}",
        "the country that buys the most exports from {}",
    ],
    "largest import partner": [
        "the largest import partner of {}",
        "the country that supplies the most imports to {}",
    ],
    "administered by": ["the country that administers {}"],
    "country": ["the country of {}", "the country that {} is in"],
}
ATTRIBUTES = {
    "capital": ["What is the capital of {}?", "Which city is the capital of {}?"],
    "currency": ["What is the currency of {}?", "Which currency is used in {}?"],
    "national anthem": ["What is the title of the national anthem of {}?"],
    "highest point": ["What is the highest point of {}?", "Which mountain is the highest in {}?"],
    "internet country code": ["What is the internet country code of {}?"],
    "nationality": ["What is a citizen of {} called?"],
    "area": ["What is the total area of {} in sq km?", "How large is {} in sq km?"],
    "population": ["What is the population of {}?", "How many people live in {}?"],
    "coastline": ["How long is the coastline of {} in km?"],
    "length of the land borders": ["What is the total length of the land borders of {} in km?"],
    "highest elevation": ["How high is the highest point of {} in m?"],
    "median age": ["What is the median age in {}?"],
    "life expectancy": ["What is the life expectancy in {}?"],
    "number of airports": [
        "How many airports are there in {}?",
        "What is the number of airports in {}?",
    ],
    "date of independence": [
        "When did {} become independent?",
        "What is the date of independence of {}?",
    ],
    "date of the national holiday": ["When is the national holiday of {}?"],
}
# What to search for; a relation or attribute not named here is searched for as "NAME of ENTITY".
QUERIES = {
    "longest border": "longest border of {}",
    "administered by": "{} administered by",
    "area": "total area of {}",
    "capital": "name of the capital of {}",
    "national anthem": "national anthem title of {}",
    "nationality": "nationality noun of {}",
    "length of the land borders": "total length of land borders of {}",
    "date of the national holiday": "national holiday of {}",
}
COMPARISONS = {
    "area": "has the larger area",
    "population": "has the larger population",
    "coastline": "has the longer coastline",
    "length of the land borders": "has the longer land borders",
    "highest elevation": "has the higher highest point",
    "median age": "has the higher median age",
    "life expectancy": "has the higher life expectancy",
    "number of airports": "has more airports",
    "date of independence": "has been independent for longer",
}
UNITS = {
    "area": " in sq km",
    "coastline": " in km",
    "length of the land borders": " in km",
    "highest elevation": " in m",
}
NUMBERS = {
    "difference": "What is the difference in {} between the two countries whose flags are shown{}?",
    "ratio": "By what factor do the two countries whose flags are shown differ in {}?",
    "years": "How many years lie between the dates on which the two countries whose flags are shown became independent?",
}
PAIR = [
    "Which of the two countries whose flags are shown {}?",
    "Two flags are shown. Which of their countries {}?",
]


def query(name: str, title: str) -> str:
    """A query that finds a relation or attribute of an entity.

    >>> query("area", "Chad"), query("population", "Chad")
    ('total area of Chad', 'population of Chad')
    """
    return QUERIES.get(name, name + " of {}").format(title)


def answer_fields(attribute: dict) -> dict:
    """`answer`, `answer_eval` and `problem_type` of an attribute; numbers are accepted within ±10%, like the benchmark's.

    >>> answer_fields({"text": "4,000", "type": "Numerical", "value": 4000.0})["answer_eval"]
    ['3600', '4400']
    >>> answer_fields({"text": "4 July 1776", "type": "Time"})["answer_eval"]
    ['4 July 1776', 'July 4, 1776']
    """
    text, kind = attribute["text"], attribute["type"]
    if kind == "Numerical":
        accepted = [
            f"{bound:.12g}"
            for bound in sorted((attribute["value"] * 0.9, attribute["value"] * 1.1))
        ]
    else:
        accepted = [text] + [re.sub(r"^(\d+) (\w+) (\d{4})$", r"\2 \1, \3", text)] * bool(
            re.match(r"\d+ \w+ \d{4}$", text)
        )
    return {"answer": text, "answer_eval": accepted, "problem_type": kind}


class World:
    """The knowledge base's entities, with the rows that hold each relation and attribute."""

    def __init__(self, kb: Path):
        if not (kb / "entities.jsonl").exists():
            raise FileNotFoundError(
                f"{kb / 'entities.jsonl'} does not exist: questions are built from a knowledge base with relations; "
                f"build one with: python build_kb.py --out {kb}"
            )
        self.kb = kb
        self.entities = {
            e["id"]: e for e in map(json.loads, open(kb / "entities.jsonl", encoding="utf-8"))
        }
        self.image_rows = {
            r["entity_id"]: r["id"]
            for r in map(json.loads, open(kb / IMAGE_CORPUS, encoding="utf-8"))
        }
        self.texts = [
            json.loads(line)["contents"] for line in open(kb / TEXT_CORPUS, encoding="utf-8")
        ]

    def text_hop(self, entity: dict, name: str) -> dict:
        """The hop that looks up one relation or attribute of an entity."""
        entry = entity["relations"].get(name) or entity["attributes"][name]
        result = self.entities[entry["target"]]["title"] if "target" in entry else entry["text"]
        rows = [row for row in entity["rows"][entry["field"]] if result in self.texts[row]]
        return {
            "action": "text_search",
            "about": entity["title"],
            "relation": name,
            "rows": rows,
            "result": result,
            "query": query(name, entity["title"]),
        }

    def image_hop(self, entity: dict, number: int) -> dict:
        return {
            "action": "image_search",
            "about": str(number),
            "relation": "",
            "rows": [self.image_rows[entity["id"]]],
            "result": entity["title"],
        }

    def chains(self, start: dict, steps: int) -> list[list[tuple[dict, str]]]:
        """All [(entity, relation or attribute looked up)] of `steps` - 1 text searches, no entity twice."""
        open_chains = [[]]
        for depth in range(steps - 1):
            grown = []
            for chain in open_chains:
                entity = (
                    self.entities[chain[-1][0]["relations"][chain[-1][1]]["target"]]
                    if chain
                    else start
                )
                if any(entity is visited for visited, _ in chain):
                    continue
                names = (
                    ATTRIBUTES.keys() & entity["attributes"].keys()
                    if depth == steps - 2
                    else RELATIONS.keys() & entity["relations"].keys()
                )
                grown += [
                    chain + [(entity, name)]
                    for name in sorted(names)
                    if self.text_hop(entity, name)["rows"]
                ]
            open_chains = grown
        return open_chains


def near_duplicates(world: World) -> set[str]:
    """Entities whose image could be an earlier entity's (Chad and Romania): not to be asked about."""
    ids = list(world.image_rows)
    thumbs = np.stack(
        [
            np.asarray(
                open_image(world.kb / world.entities[i]["image"]).resize((16, 16)), dtype=np.float32
            )
            for i in ids
        ]
    )
    return {
        i
        for n, i in enumerate(ids)
        if n and np.abs(thumbs[:n] - thumbs[n]).mean((1, 2, 3)).min() < 8
    }


def split_entities(world: World, seed: int) -> dict[str, list[dict]]:
    """Start entities of each split, every kind in the same proportion."""
    rng, excluded, splits = (
        random.Random(seed),
        near_duplicates(world),
        {"train": [], "validation": [], "test": []},
    )
    for kind in START:
        pool = [
            e
            for e in world.entities.values()
            if e["kind"] == kind and e["image"] and e["id"] not in excluded
        ]
        rng.shuffle(pool)
        for split, share in SHARES.items():
            splits[split] += [pool.pop() for _ in range(round(share * len(pool)))]
        splits["train"] += pool
    return splits


def leaks(problem: str, answer: str, hops: list[dict]) -> bool:
    """Does a question contain its answer, or name an entity of its chain?"""
    names = [answer] + [hop["result"] for hop in hops]
    return any(
        re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", problem.lower()) for name in names
    )


def bridge(world: World, rng: random.Random, start: dict, chain: list[tuple[dict, str]]) -> dict:
    """One Bridge record: describe the entity step by step, then ask for the attribute."""
    phrase = rng.choice(START[start["kind"]])
    for _, relation in chain[:-1]:
        phrase = rng.choice(RELATIONS[relation]).format(phrase)
    entity, attribute = chain[-1]
    return {
        "problem": "<image>" + rng.choice(ATTRIBUTES[attribute]).format(phrase),
        **answer_fields(entity["attributes"][attribute]),
        "split": "Bridge",
        "num_steps": 1 + len(chain),
        "hops": [world.image_hop(start, 1)] + [world.text_hop(*step) for step in chain],
        "starts": [start],
    }


def compare(
    world: World, rng: random.Random, pair: list[dict], name: str, ask: str = "name"
) -> dict | None:
    """One Compare record, or None where the pair's values are missing or less than 10% apart.

    ask: "name" of the larger (older, …), or a number: "difference", "ratio", for dates "years".
    """
    try:
        found = [entity["attributes"][name] for entity in pair]
    except KeyError:
        return None
    values = [attribute.get("value") or -int(attribute["text"][-4:]) for attribute in found]
    dated = name == "date of independence"
    if (
        dated
        and values[0] == values[1]
        or not dated
        and max(values) < 1.1 * min(values)
        or dated != (ask == "years")
        and ask != "name"
    ):
        return None
    hops = [world.image_hop(entity, i + 1) for i, entity in enumerate(pair)] + [
        world.text_hop(entity, name) for entity in pair
    ]
    if ask == "name":
        winner = pair[values.index(max(values))]["title"]
        problem, answer = (
            rng.choice(PAIR).format(COMPARISONS[name]),
            {"answer": winner, "answer_eval": [winner], "problem_type": "String"},
        )
    else:
        number = (
            round(max(values) / min(values), 2)
            if ask == "ratio"
            else round(max(values) - min(values), 4)
        )
        problem = NUMBERS[ask].format(name, UNITS.get(name, ""))
        answer = answer_fields(
            {"text": f"{number:,.10g}", "type": "Numerical", "value": float(number)}
        )
    return (
        {
            "problem": "<image><image>" + problem,
            **answer,
            "split": "Compare",
            "num_steps": 4,
            "hops": hops,
            "starts": pair,
        }
        if all(h["rows"] for h in hops)
        else None
    )


def neighbours(world: World, entities: list[dict], k: int) -> dict[str, list[dict]]:
    """{entity id: its k nearest entities} by the mean of their passages' vectors."""
    import faiss

    index = faiss.read_index(str(world.kb / TEXT_INDEX), faiss.IO_FLAG_MMAP_IFC)
    vectors = np.stack(
        [
            np.mean(
                [index.reconstruct(row) for rows in entity["rows"].values() for row in rows], axis=0
            )
            for entity in entities
        ]
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = np.argsort(-(vectors @ vectors.T), axis=1)[:, 1 : k + 1]
    return {entity["id"]: [entities[j] for j in row] for entity, row in zip(entities, order)}


def build_split(
    world: World,
    split: str,
    starts: list[dict],
    size: int,
    seed: int,
    numeric: float = 0.0,
    similar: int = 0,
    guessable: float = 0.06,
) -> list[dict]:
    """`size` distinct questions, in the proportions of ROWS, spread evenly over start entities and attributes.

    Guessing the frequent must not pay. No answer may make up more than 1.5% of a row (at least 5 questions); and among the
    questions that ask for the same attribute, or for it by way of the same relation, no guess may be accepted by more than
    `guessable` of them (at least 2; 1: no such rule): much of the world trades with the same few, and most people live to about 75.
    """
    rng, records, seen, alike = random.Random(f"{seed} {split}"), [], set(), defaultdict(list)
    for (kind, steps), share in ROWS.items():
        wanted, counts = round(share * size), Counter()
        pool = [start for start in starts if start["kind"] == "country" or kind == "Bridge"]
        countries = [start for start in pool if start["kind"] == "country"]
        near = neighbours(world, countries, similar) if similar and kind == "Compare" else {}
        for _ in range(100 * wanted):
            if kind == "Bridge":
                start = rng.choice(
                    countries if rng.random() < 0.5 else pool
                )  # half of all starts are countries
                by_end = {}
                for chain in world.chains(start, steps):
                    by_end.setdefault(chain[-1][1], []).append(chain)
                if not by_end:
                    continue
                chain = rng.choice(by_end[rng.choice(sorted(by_end))])
                record, identity = (
                    bridge(world, rng, start, chain),
                    (start["id"], *(name for _, name in chain)),
                )
            else:
                pair, name = rng.sample(countries, 2), rng.choice(sorted(COMPARISONS))
                if near:
                    pair[1] = rng.choice(near[pair[0]["id"]])
                ask = (
                    rng.choice(
                        ["years"] if name == "date of independence" else ["difference", "ratio"]
                    )
                    if numeric and rng.random() < numeric
                    else "name"
                )
                record, identity = (
                    compare(world, rng, pair, name, ask),
                    (pair[0]["id"], pair[1]["id"], name, ask),
                )
            if (
                not record
                or identity in seen
                or leaks(record["problem"], record["answer"], record["hops"])
            ):
                continue
            if counts[record["answer"]] >= max(5, 0.015 * wanted):
                continue
            if kind == "Bridge" and guessable < 1:
                cells = [
                    alike[names]
                    for names in {identity[-1:], identity[-2:] if steps > 2 else identity[-1:]}
                ]
                if any(
                    sum(accepts(other, record) for other in cell) >= max(2, guessable * len(cell))
                    for cell in cells
                ):
                    continue
                for cell in cells:
                    cell.append(record)
            counts[record["answer"]] += 1
            seen.add(identity)
            records.append(record)
            if sum(counts.values()) == wanted:
                break
    rng.shuffle(records)
    return records


def accepts(question: dict, other: dict) -> bool:
    """Would one question's answer be right for the other, or the other way round?"""
    if question["problem_type"] != "Numerical":
        return question["answer"] == other["answer"]
    (low, high), (low2, high2) = (map(float, q["answer_eval"]) for q in (question, other))
    return low <= (low2 + high2) / 2 <= high or low2 <= (low + high) / 2 <= high2


def choose_photos(world: World, record: dict, rng: random.Random) -> list[str]:
    """A photo of each start entity, as a path inside the knowledge base; never the image that is indexed."""
    chosen = []
    for start in record["starts"]:
        names = sorted(start["photos"])
        weights = [PHOTO_WEIGHTS[re.sub(r"\d", "", name)] for name in names]
        chosen.append(start["photos"][rng.choices(names, weights)[0]])
    return chosen


def verify(splits: dict[str, list[dict]], world: World) -> list[str]:
    """Prove the splits' promises (AssertionError otherwise) and describe them, a line each."""
    pictured = {
        split: {start["id"] for record in records for start in record["starts"]}
        for split, records in splits.items()
    }
    reached = {
        split: {
            hop["about"]
            for record in records
            for hop in record["hops"]
            if hop["action"] == "text_search"
        }
        for split, records in splits.items()
    }
    own = {entity["image"] for entity in world.entities.values()}
    for split, records in splits.items():
        for record in records:
            assert not leaks(record["problem"], record["answer"], record["hops"]), record
            assert not own & set(record["photos"]), record
        for other in splits:
            assert other == split or not pictured[split] & pictured[other], (
                f"{split} and {other} picture the same entity"
            )
    lines = [
        f"{split}: {len(records)} questions, {len(pictured[split])} pictured entities; "
        + ", ".join(
            f"{kind} {steps}-step {n}"
            for (kind, steps), n in sorted(
                Counter((r["split"], r["num_steps"]) for r in records).items()
            )
        )
        + "; "
        + ", ".join(
            f"{kind} {n}" for kind, n in Counter(r["problem_type"] for r in records).most_common()
        )
        for split, records in splits.items()
    ]
    shared = len(reached["test"] & reached["train"])
    return lines + [
        f"pictured in test and in training: 0; articles read in test chains: {len(reached['test'])}, of which {shared} are read in training chains too"
    ]


def build(
    kb: Path,
    out: Path,
    seed: int = 0,
    numeric: float = 0.0,
    similar: int = 0,
    guessable: float = 0.06,
    say=print,
):
    """Write {train, validation, test}.jsonl and images/ to `out`; does nothing if they are of this KB and seed."""
    world = World(kb)
    mark = json.dumps(
        [
            seed,
            numeric,
            similar,
            guessable,
            json.loads((kb / "manifest.json").read_text())["fingerprint"],
            Path(__file__).read_text(),
        ]
    )
    if (out / ".built").exists() and (out / ".built").read_text() == mark:
        return say(f"{out} is up to date")
    starts = split_entities(world, seed)
    splits = {
        split: build_split(world, split, starts[split], size, seed, numeric, similar, guessable)
        for split, size in SIZES.items()
    }
    rng = random.Random(seed)
    for records in splits.values():
        for record in records:
            record["photos"] = choose_photos(world, record, rng)
    for line in verify(splits, world):
        say(line)
    work = out.with_name(out.name + ".building")
    shutil.rmtree(work, ignore_errors=True)
    (work / "images").mkdir(parents=True)
    for split, records in splits.items():
        for number, record in enumerate(records):
            for photo in record["photos"]:
                shutil.copyfile(kb / photo, work / "images" / Path(photo).name)
            records[number] = {
                "id": f"atlas_{split}_{number:05d}",
                "images": [f"images/{Path(p).name}" for p in record.pop("photos")],
            } | {k: v for k, v in record.items() if k != "starts"}
        write_jsonl(work / f"{split}.jsonl", records)
    (work / ".built").write_text(mark)
    shutil.rmtree(out, ignore_errors=True)
    work.rename(out)
    say(f"wrote {out}")


@dataclass
class Args:
    """Build training, validation and test questions from a knowledge base with relations."""

    kb: Path = Path("data/kb")
    out: Path = Path("data/mmhops")
    seed: int = 0
    numeric_compare: float = 0.0  # share of comparisons that ask for a number
    similar: int = 0  # compare with one of this many nearest entities; 0: with any
    guessable: float = 0.06  # share of alike questions that one guess may be right for


if __name__ == "__main__":
    import tyro

    args = tyro.cli(Args)
    try:
        build(args.kb, args.out, args.seed, args.numeric_compare, args.similar, args.guessable)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
