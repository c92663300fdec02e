"""Multimodal multi-hop questions from a knowledge base's own relations (MMhops).

    python -m mmhops.build --kb data/kb --out data/mmhops
    python -m mmhops.build --kb data/kb --out data/mmhops-paper --mix paper

**Bridge**: start from a picture, "the country whose flag is shown in the image". Each step replaces
the entity by a description, "the largest export partner of <…>"; the last step asks for an
attribute, "What is the capital of <…>?". n steps are n tool calls: one image search, then text
searches.

**Compare**: two pictures and a quantity that both entities have, "Which of the two countries whose
flags are shown has the larger population?". Four tool calls: two image searches, two text searches.

Splits are by start entity: nothing pictured in a test question is pictured in training.
"""

import hashlib
import math
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from files.images import open_image
from files.records import FAULTS, DataError, read_jsonl, write_jsonl
from files.terminal import fail
from mmhops.phrases import (
    ATTRIBUTES,
    COMPARISONS,
    FEW,
    MANY,
    RELATIONS,
    START,
    UNITS,
    Words,
    query,
)
from retrieval import IMAGE_CORPUS, TEXT_CORPUS, TEXT_INDEX, read_manifest

RULES = 1  # raise it when questions are made in another way: old folders are then built again
SIZES = {"train": 6600, "validation": 500, "test": 1000}  # questions


@dataclass(frozen=True)
class Mix:
    """What a benchmark is made of."""

    shares: dict[tuple[str, int], float]  # (kind, steps): share of a split's questions
    numeric_compare: float = 0.0  # share of comparisons that ask for a number
    similar: int = 0  # compare with one of this many nearest entities; 0: with any
    guessable: float = 0.06  # share of alike questions that one guess may be right for
    numerical: float | None = None  # share of Bridge questions whose answer is a number; None: any
    words: Words = FEW


MIXES = {
    # what a policy of a million parameters can learn: it cannot do arithmetic
    "tiny": Mix(
        {("Bridge", 3): 0.42, ("Bridge", 4): 0.28, ("Bridge", 2): 0.15, ("Compare", 4): 0.15}
    ),
    # the shape of the paper's: steps 70.8 : 29.2 over both kinds together, 85 : 15, mostly numbers
    "paper": Mix(
        {("Bridge", 3): 0.708, ("Bridge", 4): 0.142, ("Compare", 4): 0.15},
        numeric_compare=0.8,
        similar=10,
        guessable=0.15,
        numerical=0.62,
        words=MANY,
    ),
}
# Start entities of a split: this share of what the split before it left; the rest are for training.
START_SHARES = {"validation": 0.1, "test": 0.2}
PHOTO_WEIGHTS = {"augmented": 1.0, "waved": 1.0, "glossy": 0.5, "photograph": 1.0}
TRIES = 100  # candidates drawn per question wanted, before a split stays smaller
TOLERANCE = 0.1  # numbers are accepted within ±10%, like the benchmark's
INDEPENDENCE = "date of independence"  # the one quantity compared that is a date

Chain = list[tuple[dict, str]]  # [(entity read, relation or attribute looked up there)]


# ------------------------------------------------------------------------------ answers


def answer_fields(attribute: dict) -> dict:
    """`answer`, `answer_eval` and `problem_type` of an attribute: {"text", "type"[, "value"]}.

    >>> answer_fields({"text": "4,000", "type": "Numerical", "value": 4000.0})["answer_eval"]
    ['3600', '4400']
    >>> answer_fields({"text": "4 July 1776", "type": "Time"})["answer_eval"]
    ['4 July 1776', 'July 4, 1776']
    """
    text, kind = attribute["text"], attribute["type"]
    if kind == "Numerical":
        value = attribute["value"]
        bounds = sorted((value * (1 - TOLERANCE), value * (1 + TOLERANCE)))
        accepted = [f"{bound:.12g}" for bound in bounds]
    else:
        accepted = [text]
        date = re.fullmatch(r"(\d+) (\w+) (\d{4})", text)
        if date:
            day, month, year = date.groups()
            accepted.append(f"{month} {day}, {year}")
    return {"answer": text, "answer_eval": accepted, "problem_type": kind}


def number_fields(number: float) -> dict:
    """`answer_fields` of a number that was computed.

    >>> number_fields(1234.5)["answer"]
    '1,234.5'
    """
    text = f"{number:,.10g}"
    return answer_fields({"text": text, "type": "Numerical", "value": float(number)})


def names_the_chain(problem: str, answer: str, hops: list[dict]) -> bool:
    """Does a question contain its answer, or name an entity of its chain?

    A name counts where it stands as whole words, spelled as in the knowledge base, in any case.
    (`quality.given_away` is stricter: it drops articles and punctuation first.)
    """
    text = problem.lower()
    names = [answer] + [hop["result"] for hop in hops]
    return any(as_words(name.lower()).search(text) for name in names)


@cache  # there are more names than `re` remembers
def as_words(name: str) -> re.Pattern:
    """Finds a name where it stands as whole words."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")


class Guess(NamedTuple):
    """A question's answer, and the range of the numbers that are accepted: NaN of other answers."""

    answer: str
    low: float
    middle: float
    high: float


def guess_of(question: dict) -> Guess:
    """A record's answer as a guess at other questions."""
    if question["problem_type"] != "Numerical":
        return Guess(question["answer"], math.nan, math.nan, math.nan)
    low, high = map(float, question["answer_eval"])
    return Guess(question["answer"], low, (low + high) / 2, high)


# ------------------------------------------------------------------------------ entities and chains


def records(path: Path, *needed: str) -> Iterator[dict]:
    """Of a knowledge base's file. Raises DataError, naming the line, where one lacks a value."""
    for number, record in read_jsonl(path):
        for name in needed:
            if name not in record:
                raise DataError(f"{path}:{number}: no {name!r}; build the knowledge base again")
        yield record


class Graph:
    """A knowledge base's entities and relations, with the corpus rows that hold each.

    entities: {id: record of entities.jsonl}, in the file's order. image_rows: {id: row of the image
    corpus}. texts: the text corpus, as "title\\ntext", by row.
    """

    def __init__(self, kb: Path):
        if not (kb / "entities.jsonl").exists():
            raise FileNotFoundError(
                f"{kb / 'entities.jsonl'} does not exist: questions are built from a knowledge "
                f"base with relations; build one with: python build_kb.py --out {kb}"
            )
        self.kb = kb
        self.entities = {record["id"]: record for record in records(kb / "entities.jsonl", "id")}
        self.image_rows = {
            record["entity_id"]: record["id"]
            for record in records(kb / IMAGE_CORPUS, "entity_id", "id")
        }
        self.texts = [record["contents"] for record in records(kb / TEXT_CORPUS, "contents")]
        self.chains_of = {}  # {(entity's id, steps): its chains}: an entity is drawn often

    def image_hop(self, entity: dict, number: int) -> dict:
        """The hop that looks up what image `number` (1-based) shows."""
        return {
            "action": "image_search",
            "about": str(number),
            "relation": "",
            "rows": [self.image_rows[entity["id"]]],
            "result": entity["title"],
        }

    def text_hop(self, entity: dict, name: str) -> dict:
        """The hop that looks up one relation or attribute of an entity.

        `rows` are those of the field's passages in which the result stands; there may be none.
        """
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

    def chains(self, start: dict, steps: int) -> dict[str, list[Chain]]:
        """{attribute: all chains of `steps` - 1 text searches that end with it}.

        Attributes are sorted; what a chain follows before its attribute are relations.

        No entity comes twice, and every hop has a passage that says its result.
        """
        key = (start["id"], steps)
        if key not in self.chains_of:
            by_attribute = defaultdict(list)
            for chain in self.extend([], start, steps - 1):
                _, attribute = chain[-1]
                by_attribute[attribute].append(chain)
            self.chains_of[key] = dict(sorted(by_attribute.items()))
        return self.chains_of[key]

    def extend(self, chain: Chain, entity: dict, searches_left: int) -> Iterator[Chain]:
        """The chains that begin with `chain` and go on at `entity`; names sorted at every step."""
        if any(entity is visited for visited, _ in chain):
            return
        if searches_left == 1:
            names = ATTRIBUTES.keys() & entity["attributes"].keys()
        else:
            names = RELATIONS.keys() & entity["relations"].keys()
        for name in sorted(names):
            if not self.text_hop(entity, name)["rows"]:
                continue
            longer = [*chain, (entity, name)]
            if searches_left == 1:
                yield longer
            else:
                following = self.entities[entity["relations"][name]["target"]]
                yield from self.extend(longer, following, searches_left - 1)


def near_duplicates(graph: Graph) -> set[str]:
    """Ids of entities whose image could be an earlier entity's (Chad and Romania)."""
    ids = list(graph.image_rows)

    def thumbnail(entity_id):
        image = open_image(graph.kb / graph.entities[entity_id]["image"])
        return np.asarray(image.resize((16, 16)), dtype=np.float32)  # (16, 16, 3)

    thumbnails = np.stack([thumbnail(entity_id) for entity_id in ids])  # (N, 16, 16, 3)
    duplicates = set()
    for i in range(1, len(ids)):
        distances = np.abs(thumbnails[:i] - thumbnails[i]).mean((1, 2, 3))  # (i,), levels of 255
        if distances.min() < 8:
            duplicates.add(ids[i])
    return duplicates


def split_entities(graph: Graph, seed: int) -> dict[str, list[dict]]:
    """Start entities of each split, every kind in the same proportion; no near duplicates."""
    rng = random.Random(seed)
    excluded = near_duplicates(graph)
    splits = {"train": [], "validation": [], "test": []}
    for kind in START:
        pool = [
            entity
            for entity in graph.entities.values()
            if entity["kind"] == kind and entity["image"] and entity["id"] not in excluded
        ]
        rng.shuffle(pool)
        for split, share in START_SHARES.items():
            count = round(share * len(pool))
            splits[split] += [pool.pop() for _ in range(count)]
        splits["train"] += pool
    return splits


def neighbours(graph: Graph, entities: list[dict], k: int) -> dict[str, list[dict]]:
    """{entity id: the k nearest of the others}, by the cosine of their passages' mean vectors."""
    import faiss

    index = faiss.read_index(str(graph.kb / TEXT_INDEX), faiss.IO_FLAG_MMAP_IFC)

    def mean_vector(entity):
        rows = [row for field_rows in entity["rows"].values() for row in field_rows]
        return np.mean([index.reconstruct(row) for row in rows], axis=0)  # (d,)

    vectors = np.stack([mean_vector(entity) for entity in entities])  # (N, d)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = np.argsort(-(vectors @ vectors.T), axis=1)[:, 1 : k + 1]  # (N, k); the first is itself
    return {entity["id"]: [entities[i] for i in row] for entity, row in zip(entities, order)}


# ------------------------------------------------------------------------------ one question


def bridge_question(
    graph: Graph, rng: random.Random, start: dict, chain: Chain, words: Words = FEW
) -> dict:
    """A Bridge record: describe the entity step by step, then ask for the attribute."""
    description = rng.choice(words.start[start["kind"]])
    for _, relation in chain[:-1]:
        description = rng.choice(words.relations[relation]).format(description)
    entity, attribute = chain[-1]
    return {
        "problem": "<image>" + rng.choice(words.attributes[attribute]).format(description),
        **answer_fields(entity["attributes"][attribute]),
        "split": "Bridge",
        "num_steps": 1 + len(chain),
        "hops": [graph.image_hop(start, 1)] + [graph.text_hop(*step) for step in chain],
        "starts": [start],
    }


def comparison_question(
    graph: Graph,
    rng: random.Random,
    pair: list[dict],
    name: str,
    ask: str = "name",
    words: Words = FEW,
) -> dict | None:
    """A Compare record; None where a value is missing or cannot be found, or the two are too close.

    name: a key of COMPARISONS. ask: "name" of the one with the larger value (of dates, the earlier
    one), never "the first", so that nothing can be guessed before searching; or a number:
    "difference" or "ratio" of two quantities, "years" between two dates.
    """
    # 1) The values. A date counts as minus its year, so that the larger one is the older one.
    if not all(name in entity["attributes"] for entity in pair):
        return None
    found = [entity["attributes"][name] for entity in pair]
    if name == INDEPENDENCE:
        values = [-int(attribute["text"][-4:]) for attribute in found]
        too_close = values[0] == values[1]
    else:
        values = [attribute["value"] for attribute in found]
        too_close = max(values) < (1 + TOLERANCE) * min(values)
    if too_close:
        return None

    # 2) The question and its answer.
    if ask == "name":
        winner = pair[values.index(max(values))]["title"]
        problem = rng.choice(words.which_of_two).format(COMPARISONS[name])
        answer = {"answer": winner, "answer_eval": [winner], "problem_type": "String"}
    else:
        problem = rng.choice(words.how_far_apart[ask]).format(name, UNITS.get(name, ""))
        if ask == "ratio":
            number = round(max(values) / min(values), 2)
        else:
            number = round(max(values) - min(values), 4)
        answer = number_fields(number)

    # 3) The chain. It is checked last because 2) draws a phrase also for what is dropped here.
    hops = [graph.image_hop(entity, i) for i, entity in enumerate(pair, 1)]
    hops += [graph.text_hop(entity, name) for entity in pair]
    if not all(hop["rows"] for hop in hops):
        return None
    return {
        "problem": "<image><image>" + problem,
        **answer,
        "split": "Compare",
        "num_steps": 4,
        "hops": hops,
        "starts": pair,
    }


# ------------------------------------------------------------------------------ a split


@dataclass
class Candidate:
    """A question that was drawn, and may be kept."""

    record: dict
    identity: tuple  # candidates of the same identity ask the same thing
    groups: set[tuple]  # keys of the groups of like questions it belongs to; none for a comparison


def draw_bridge(
    graph: Graph,
    rng: random.Random,
    starts: list[dict],
    countries: list[dict],
    steps: int,
    words: Words = FEW,
) -> Candidate | None:
    """A Bridge question, spread evenly over start entities, then over the attributes asked for.

    None where no chain of so many steps starts at the entity drawn.
    """
    # 1) Half of all starts are countries, however many other things there are.
    start = rng.choice(countries if rng.random() < 0.5 else starts)
    # 2) The attribute first, then a chain that ends with it: otherwise those with many chains win.
    chains = graph.chains(start, steps)
    if not chains:
        return None
    chain = rng.choice(chains[rng.choice(list(chains))])
    # 3) Alike are questions for the same attribute, and those that reach it by the same relation.
    names = tuple(name for _, name in chain)
    return Candidate(
        bridge_question(graph, rng, start, chain, words),
        identity=(start["id"], *names),
        groups={names[-1:], names[-2:]},
    )


def draw_comparison(
    graph: Graph,
    rng: random.Random,
    countries: list[dict],
    near: dict[str, list[dict]],
    mix: Mix,
) -> Candidate | None:
    """A comparison of two countries; None where they cannot be compared in what was drawn.

    near: {id: entities to compare it with}; empty: any.
    """
    pair = rng.sample(countries, 2)
    name = rng.choice(sorted(COMPARISONS))
    if near:
        pair[1] = rng.choice(near[pair[0]["id"]])
    ask = "name"
    if mix.numeric_compare and rng.random() < mix.numeric_compare:
        ask = rng.choice(["years"] if name == INDEPENDENCE else ["difference", "ratio"])
    record = comparison_question(graph, rng, pair, name, ask, mix.words)
    if record is None:
        return None
    return Candidate(record, identity=(pair[0]["id"], pair[1]["id"], name, ask), groups=set())


def guess_pays(guess: Guess, group: list[Guess], guessable: float) -> bool:
    """Is the guess right for `guessable` of the group (at least 2) already? A number also counts
    where the group's guess is right for its question."""
    if guessable >= 1:
        return False
    answer, low, middle, high = guess
    fitting = sum(
        other.answer == answer or low <= other.middle <= high or other.low <= middle <= other.high
        for other in group
    )
    return fitting >= max(2, guessable * len(group))


def wanted_numbers(kind: str, wanted: int, mix: Mix) -> dict[bool, int]:
    """{does the answer have to be a number?: how many questions of that sort are wanted}."""
    if kind == "Compare" or mix.numerical is None:
        return {True: wanted, False: wanted}  # whatever comes
    numbers = round(mix.numerical * wanted)
    return {True: numbers, False: wanted - numbers}


def build_split(
    graph: Graph,
    split: str,
    starts: list[dict],
    size: int,
    seed: int,
    mix: Mix = MIXES["tiny"],
) -> list[dict]:
    """`size` distinct questions in the proportions of the mix; fewer where none are left.

    Guessing the frequent must not pay: much of the world trades with the same few countries, and
    most people live to about 75. So no answer makes up more than 1.5% of a kind's questions (at
    least 5); and among Bridge questions for the same attribute, or for it by way of the same
    relation, no guess is accepted by more than `guessable` of them (at least 2; 1: no such rule).
    """
    rng = random.Random(f"{seed} {split}")
    countries = [start for start in starts if start["kind"] == "country"]
    near = neighbours(graph, countries, mix.similar) if mix.similar else {}
    records = []
    identities = set()
    groups = defaultdict(list)  # {what questions are alike in: their guesses}
    for (kind, steps), share in mix.shares.items():
        wanted = round(share * size)
        answers = Counter()
        left = wanted_numbers(kind, wanted, mix)
        for _ in range(TRIES * wanted):
            # 1) Draw a candidate.
            if kind == "Bridge":
                candidate = draw_bridge(graph, rng, starts, countries, steps, mix.words)
            else:
                candidate = draw_comparison(graph, rng, countries, near, mix)
            if candidate is None:
                continue
            record = candidate.record
            is_number = record["problem_type"] == "Numerical"

            # 2) It must be new, of a kind that is still wanted, and not say what is to be found.
            if left[is_number] == 0:
                continue
            if candidate.identity in identities:
                continue
            if names_the_chain(record["problem"], record["answer"], record["hops"]):
                continue

            # 3) Guessing must not pay.
            if answers[record["answer"]] >= max(5, 0.015 * wanted):
                continue
            alike = [groups[key] for key in candidate.groups]
            guess = guess_of(record)
            if any(guess_pays(guess, group, mix.guessable) for group in alike):
                continue

            # 4) Keep it.
            records.append(record)
            identities.add(candidate.identity)
            answers[record["answer"]] += 1
            left[is_number] -= 1
            for group in alike:
                group.append(guess)
            if answers.total() == wanted:
                break
    rng.shuffle(records)
    return records


def choose_photos(record: dict, rng: random.Random) -> list[str]:
    """A photo of each start entity, as a path inside the knowledge base.

    Another drawing, a photograph or an augmented image: never the image that is indexed.
    """
    chosen = []
    for start in record["starts"]:
        names = sorted(start["photos"])
        weights = [PHOTO_WEIGHTS[re.sub(r"\d", "", name)] for name in names]
        name = rng.choices(names, weights)[0]
        chosen.append(start["photos"][name])
    return chosen


# ------------------------------------------------------------------------------ all splits


def pictured_ids(records: list[dict]) -> set[str]:
    return {start["id"] for record in records for start in record["starts"]}


def articles_read(records: list[dict]) -> set[str]:
    """Titles of the articles that the chains' text searches read."""
    hops = [hop for record in records for hop in record["hops"]]
    return {hop["about"] for hop in hops if hop["action"] == "text_search"}


def check_promises(splits: dict[str, list[dict]], graph: Graph):
    """What the splits promise: no leak, no indexed picture, no pictured entity in two of them.

    Raises AssertionError, with the question or the splits.
    """
    indexed = {entity["image"] for entity in graph.entities.values()}
    pictured = {split: pictured_ids(records) for split, records in splits.items()}
    for split, records in splits.items():
        for record in records:
            assert not names_the_chain(record["problem"], record["answer"], record["hops"]), record
            assert not indexed & set(record["photos"]), record
        for other in splits:
            assert other == split or not pictured[split] & pictured[other], (
                f"{split} and {other} picture the same entity"
            )


def describe(splits: dict[str, list[dict]]) -> list[str]:
    """A line per split with its counts, and one on what test and training have in common."""
    lines = []
    for split, records in splits.items():
        kinds = Counter((record["split"], record["num_steps"]) for record in records)
        types = Counter(record["problem_type"] for record in records)
        lines.append(
            f"{split}: {len(records)} questions, {len(pictured_ids(records))} pictured entities; "
            + ", ".join(f"{kind} {steps}-hop {n}" for (kind, steps), n in sorted(kinds.items()))
            + "; "
            + ", ".join(f"{kind} {n}" for kind, n in types.most_common())
        )
    # The entities further down a chain do recur: there are only so many countries.
    in_test = articles_read(splits["test"])
    in_both = in_test & articles_read(splits["train"])
    lines.append(
        "pictured in test and in training: 0; "
        f"articles read in test chains: {len(in_test)}, "
        f"of which {len(in_both)} are read in training chains too"
    )
    return lines


def write_split(folder: Path, kb: Path, split: str, records: list[dict]):
    """FOLDER/SPLIT.jsonl, and the records' photos in FOLDER/images."""
    written = []
    for number, record in enumerate(records):
        names = [Path(photo).name for photo in record["photos"]]
        for photo, name in zip(record["photos"], names):
            if not (folder / "images" / name).exists():
                shutil.copyfile(kb / photo, folder / "images" / name)
        fields = {
            "id": f"atlas_{split}_{number:05d}",
            "images": [f"images/{name}" for name in names],
        }
        # what only this module needs is not written
        fields |= {key: record[key] for key in record if key not in ("starts", "photos")}
        written.append(fields)
    write_jsonl(folder / f"{split}.jsonl", written)


def build(
    kb: Path,
    out: Path,
    seed: int = 0,
    mix: Mix = MIXES["tiny"],
    say=print,
):
    """Write {train, validation, test}.jsonl and images/ to `out`.

    Does nothing where `out` was built by these RULES, of this knowledge base, with these arguments.
    Raises FileNotFoundError where the knowledge base has no relations.
    """
    graph = Graph(kb)
    kb_fingerprint = read_manifest(kb).get("fingerprint")
    made_with = repr((RULES, seed, mix, kb_fingerprint))
    fingerprint = hashlib.sha256(made_with.encode()).hexdigest()
    if (out / ".built").exists() and (out / ".built").read_text() == fingerprint:
        return say(f"{out} is up to date")
    if out.exists() and not (out / ".built").exists():
        raise DataError(
            f"{out} exists and was not built by this command; name another folder with --out"
        )

    # 1) Questions.
    starts = split_entities(graph, seed)
    splits = {
        split: build_split(graph, split, starts[split], size, seed, mix)
        for split, size in SIZES.items()
    }
    # 2) Pictures.
    rng = random.Random(seed)
    for records in splits.values():
        for record in records:
            record["photos"] = choose_photos(record, rng)
    # 3) Are they what they should be?
    check_promises(splits, graph)
    for line in describe(splits):
        say(line)
    # 4) Write under another name and rename: the folder is whole or not there.
    work = out.with_name(out.name + ".building")
    shutil.rmtree(work, ignore_errors=True)
    (work / "images").mkdir(parents=True)
    for split, records in splits.items():
        write_split(work, kb, split, records)
    (work / ".built").write_text(fingerprint)
    shutil.rmtree(out, ignore_errors=True)
    work.rename(out)
    say(f"wrote {out}")


@dataclass
class Args:
    """Build training, validation and test questions from a knowledge base with relations."""

    kb: Path = Path("data/kb")
    out: Path = Path("data/mmhops")
    seed: int = 0
    mix: Literal["tiny", "paper"] = "tiny"  # what a laptop can learn, or the paper's shape
    # instead of what the mix says:
    numeric_compare: float | None = None  # share of comparisons that ask for a number
    similar: int | None = None  # compare with one of this many nearest entities; 0: with any
    guessable: float | None = None  # share of alike questions that one guess may be right for


def mix_of(args: Args) -> Mix:
    """The mix, as the flags change it."""
    changes = {
        name: getattr(args, name)
        for name in ("numeric_compare", "similar", "guessable")
        if getattr(args, name) is not None
    }
    return replace(MIXES[args.mix], **changes)


if __name__ == "__main__":
    import tyro

    args = tyro.cli(Args)
    try:
        build(args.kb, args.out, args.seed, mix_of(args))
    except FAULTS as error:
        fail(error)
