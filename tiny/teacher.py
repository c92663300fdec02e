"""The teacher: scripted episodes over what the retriever really finds, each in a world of its own.

It knows the gold chain of a question and reads honestly: every name is written as it was read, and
where a passage was not found it thinks "I will guess" and guesses. How it goes about the chain are
its `Habits`. The honest teacher looks everything up. The lazy one guesses before a search, most
often before the last one, and now and then loses a tag; a search skipped is a search that it could
have done. A `Counterfactual` world rewrites all that it reads and writes.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import rollout
from data import Question
from mmhops.build import Graph
from mmhops.phrases import (
    ATTRIBUTES,
    COMPARISONS,
    RELATIONS,
    WHICH_OF_TWO,
    query,
    single_hop_questions,
)
from retrieval import Hit, KnowledgeBase
from tiny.counterfactual import YEARS, Counterfactual, Names


@dataclass(frozen=True)
class Habits:
    """How careless an episode is: probabilities."""

    guess: float = 0.0  # before a search, to answer with a guess instead
    guess_last: float = 0.0  # the same, before the last search
    break_tag: float = 0.0  # per episode, that one turn lacks a tag


HONEST = Habits()
LAZY = Habits(guess=0.2, guess_last=0.8, break_tag=0.15)


@dataclass(frozen=True)
class Step:
    """What the teacher means to do in a turn."""

    thought: str
    action: str  # image_search | text_search | answer
    argument: str
    lines: list[str] | None  # what a search finds; None for an answer

    @property
    def text(self) -> str:
        return turn_text(self.thought, self.action, self.argument)


@dataclass(frozen=True)
class ScriptedTurn:
    """What stands in an episode: a turn's text, perhaps with a tag missing."""

    text: str
    lines: list[str] | None  # what comes back; None for an answer


@dataclass(frozen=True)
class Reading:
    """What a text search for a relation or attribute brought."""

    lines: list[str]  # of the observation, as written in the world
    read: str | None  # the result as written there; None where the lines do not say it
    real: str | None  # the result in the real world; None where the entity has no such relation


def turn_text(thought: str, action: str, argument: str) -> str:
    """
    >>> turn_text("it is Chad", "text_search", "capital of Chad")
    '<think> it is Chad</think><text_search> capital of Chad</text_search>'
    """
    return f"<think> {thought}</think><{action}> {argument}</{action}>"


def answer_step(thought: str, answer: str) -> Step:
    return Step(thought, "answer", answer, lines=None)


def scripted_drill(drill: tuple[str, list[Step]] | None) -> tuple[str, list[ScriptedTurn]] | None:
    """A drill's steps as they stand in an episode."""
    if drill is None:
        return None
    question, steps = drill
    return question, [ScriptedTurn(step.text, step.lines) for step in steps]


def image_step(thought: str, number: int, title: str) -> Step:
    """An image search that finds the title."""
    lines = rollout.image_lines(number, [Hit(title, "", 0.0, 0)])
    return Step(thought, "image_search", f"image {number}", lines)


def broken(text: str, rng: random.Random) -> str:
    """The turn without one of its tags, or without its thought."""
    without_a_tag = [
        text.replace("</think>", ""),
        text.replace("<think>", ""),
        re.sub(r"<think>.*</think>", "", text),
        re.sub("|".join(rollout.CLOSING), "", text),
    ]
    return rng.choice(without_a_tag)


def signs(value1: str, value2: str, is_date: bool = False) -> str:
    """Two values compared in small steps: how many digits they have, then digit by digit.

    It ends at the first difference. Of dates only the years are compared.

    >>> signs("1,284,000", "1,124,192"), signs("8.5", "12"), signs("11 August 1960", "1821", True)
    ('7=7 1=1 2>1', '1<2', '1=1 9>8')
    """
    if is_date:
        digits1, digits2 = value1[-4:], value2[-4:]
        pairs = list(zip(digits1, digits2))
    else:
        length1, digits1 = whole_digits(value1)
        length2, digits2 = whole_digits(value2)
        pairs = [(length1, length2), *zip_longest(digits1, digits2, fillvalue="0")]
    written = []
    for a, b in pairs:
        sign = "=" if int(a) == int(b) else ">" if int(a) > int(b) else "<"
        written.append(f"{a}{sign}{b}")
        if sign != "=":
            break
    return " ".join(written)


def whole_digits(value: str) -> tuple[int, str]:
    """How many digits a number has before the point, and all its digits.

    >>> whole_digits("1,284,000"), whole_digits("8.5")
    ((7, '1284000'), (1, '85'))
    """
    number = re.sub(r"[^\d.]", "", value)
    return len(number.partition(".")[0]), number.replace(".", "")


def verdict(name: str, first: str, value1: str, second: str, value2: str) -> Step | None:
    """The answer to a comparison; its thought says the second value, as an earlier one the first.

    The larger value wins, of dates the earlier year. None where the values are closer than those of
    the questions are, so that the answer would hang on little.

    >>> verdict("area", "Chad", "1,284,000", "Mali", "1,240,192") is None
    True
    >>> verdict("area", "Chad", "1,284,000", "Mali", "1,124,192").thought
    'area of Mali is 1,124,192 7=7 1=1 2>1 so Chad'
    >>> verdict("date of independence", "Chad", "11 August 1960", "Peru", "28 July 1821").thought
    'date of independence of Peru is 28 July 1821 1=1 9>8 so Peru'
    """
    is_date = "date" in name
    number1, number2 = (
        float(value[-4:] if is_date else re.sub(r"[^\d.]", "", value)) for value in (value1, value2)
    )
    if number1 == number2:
        return None
    if not is_date and max(number1, number2) < 1.1 * min(number1, number2):
        return None
    compared = signs(value1, value2, is_date)
    winner = first if (number1 > number2) != is_date else second
    return answer_step(f"{name} of {second} is {value2} {compared} so {winner}", winner)


class Teacher:
    """Writes episodes and drills. One random generator draws everything, in the order of the calls.

    topk: passages per text search.
    """

    def __init__(self, kb: KnowledgeBase, graph: Graph, topk: int, seed: int = 0):
        self.kb = kb
        self.graph = graph
        self.topk = topk
        self.rng = random.Random(seed)
        self.names = Names(graph)
        self.by_title = {entity["title"]: entity for entity in graph.entities.values()}
        # every (entity, relation or attribute) that can be asked for
        self.pairs = [
            (entity, name)
            for entity in graph.entities.values()
            for name in {**entity["relations"], **entity["attributes"]}
            if name in RELATIONS or name in ATTRIBUTES
        ]
        # {(title, relation or attribute): hits}, of all of them in one batch
        keys = [(entity["title"], name) for entity, name in self.pairs]
        queries = [query(name, title) for title, name in keys]
        self.found = dict(zip(keys, kb.text_search(queries, topk)))
        # those whose article is found, but after another one
        self.confusable = []
        for entity, name in self.pairs:
            titles = [hit.title for hit in self.hits(entity["title"], name)]
            if entity["title"] in titles[1:] and titles[0] != entity["title"]:
                self.confusable.append((entity, name))

    # -------------------------------------------------------------------------- reading

    def hits(self, title: str, name: str) -> list[Hit]:
        """What the retriever finds for a relation or attribute of a real title; remembered."""
        if (title, name) not in self.found:
            self.found[title, name] = self.kb.text_search([query(name, title)], self.topk)[0]
        return self.found[title, name]

    def look_up(self, title: str, name: str, world: Counterfactual) -> Reading:
        """Search for a relation or attribute of a real title, and read what comes back."""
        hits = self.hits(title, name)
        lines = rollout.text_lines(
            [Hit(world(hit.title), world(hit.text), hit.score, hit.row) for hit in hits]
        )
        entity = self.by_title.get(title)
        if entity is None or (name not in entity["relations"] and name not in entity["attributes"]):
            return Reading(lines, read=None, real=None)
        hop = self.graph.text_hop(entity, name)
        said = any(
            hit.row in hop["rows"] and world(hop["result"]) in line
            for hit, line in zip(hits, lines)
        )
        return Reading(lines, world(hop["result"]) if said else None, hop["result"])

    def guess(self, question: Question, world: Counterfactual) -> Step:
        """An answer of the right kind, from nowhere."""
        if question.split == "Compare":
            guessed = self.rng.choice(self.names.pools["country"])
        else:
            asked = question.hops[-1].relation
            guessed = self.rng.choice(
                [
                    entity["attributes"][asked]["text"]
                    for entity, name in self.pairs
                    if name == asked
                ]
            )
        return answer_step("I will guess", world(guessed))

    # -------------------------------------------------------------------------- episodes

    def steps(self, question: Question, world: Counterfactual) -> Iterator[Step]:
        """The steps down the gold chain; the last one answers."""
        if question.split == "Compare":
            return self.compare_steps(question, world)
        return self.bridge_steps(question, world)

    def bridge_steps(self, question: Question, world: Counterfactual) -> Iterator[Step]:
        """Image, relation, …, attribute, answer; or a guess where a reading fails."""
        image_hop, *text_hops = question.hops
        real = image_hop.result  # the entity, or at the end the answer, in the real world
        name = world(real)  # and as it was read
        yield image_step("identify image 1", 1, name)
        for hop in text_hops:
            reading = self.look_up(real, hop.relation, world)
            yield Step(f"it is {name}", "text_search", query(hop.relation, name), reading.lines)
            if reading.read is None:
                yield self.guess(question, world)
                return
            real, name = reading.real, reading.read
        yield answer_step(f"it is {name}", name)

    def compare_steps(self, question: Question, world: Counterfactual) -> Iterator[Step]:
        """Image 1, image 2, value 1, value 2, verdict; without the verdict where it is too close.

        Where one of the values cannot be read, one of the names is guessed after the first search.
        """
        real1, real2 = question.hops[0].result, question.hops[1].result
        asked = question.hops[2].relation

        # 1) The images.
        first, second = world(real1), world(real2)
        yield image_step("identify image 1", 1, first)
        yield image_step(f"image 1 is {first}", 2, second)

        # 2) The values.
        reading1 = self.look_up(real1, asked, world)
        reading2 = self.look_up(real2, asked, world)
        yield Step(f"image 2 is {second}", "text_search", query(asked, first), reading1.lines)
        if reading1.read is None or reading2.read is None:
            yield answer_step("I will guess", self.rng.choice([first, second]))
            return
        thought = f"{asked} of {first} is {reading1.read}"
        yield Step(thought, "text_search", query(asked, second), reading2.lines)

        # 3) The verdict.
        last = verdict(asked, first, reading1.read, second, reading2.read)
        if last:
            yield last

    def episode(
        self, question: Question, habits: Habits, max_turns: int
    ) -> list[ScriptedTurn] | None:
        """A whole episode in a world of its own, of at most max_turns + 1 turns.

        None where the steps end without an answer: a comparison that is too close.
        """
        # 1) A world, and where the carelessness will be: at which step.
        world = Counterfactual(self.names, self.rng)
        searches = question.num_steps
        guess_at = next((n for n in range(searches) if self.guesses(n, searches, habits)), None)
        break_at = None
        if self.rng.random() < habits.break_tag:
            break_at = self.rng.randrange(1 + (searches if guess_at is None else guess_at))

        turns = []
        for number, step in enumerate(self.steps(question, world)):
            # 2) Guess, on purpose, or because the last turn may only answer.
            out_of_turns = len(turns) == max_turns and step.action != "answer"
            if number == guess_at or out_of_turns:
                step = self.guess(question, world)

            # 3) Break a tag, unless this is the last turn. A turn without a readable action is
            #    answered by a correction, and the step is repeated, or guessed, in the next turn.
            text = step.text
            if number == break_at and len(turns) < max_turns:
                bad = broken(text, self.rng)
                if rollout.parse_turn(bad).action == rollout.INVALID:
                    turns.append(ScriptedTurn(bad, [rollout.NO_ACTION]))
                    if len(turns) == max_turns and step.action != "answer":
                        step = self.guess(question, world)
                        text = step.text
                else:
                    text = bad

            # 4) Take the step.
            turns.append(ScriptedTurn(text, step.lines))
            if step.action == "answer":
                return turns
        return None

    def guesses(self, search: int, searches: int, habits: Habits) -> bool:
        """Whether it guesses instead of this one of so many searches."""
        is_last = search == searches - 1
        return self.rng.random() < (habits.guess_last if is_last else habits.guess)

    # -------------------------------------------------------------------------- drills

    def drill(self) -> tuple[str, list[ScriptedTurn]] | None:
        """(question, turns) of one look-up, text only; every fourth is a comparison.

        None where a passage was not found, or the two values are too close.
        """
        world = Counterfactual(self.names, self.rng)
        if self.rng.random() < 0.25:
            return scripted_drill(self.comparison_drill(world))
        return scripted_drill(self.reading_drill(world, self.pairs))

    def title_drill(self) -> tuple[str, list[ScriptedTurn]] | None:
        """A look-up that finds another article first: it has to read the titles."""
        world = Counterfactual(self.names, self.rng)
        return scripted_drill(self.reading_drill(world, self.confusable))

    def reading_drill(
        self, world: Counterfactual, pairs: list[tuple[dict, str]]
    ) -> tuple[str, list[Step]] | None:
        """One search turn, its passages, the answer. pairs: (entity, relation or attribute)."""
        entity, name = self.rng.choice(pairs)
        reading = self.look_up(entity["title"], name, world)
        if reading.read is None:
            return None
        title = world(entity["title"])
        question = self.rng.choice(single_hop_questions(name)).format(title)
        return question, [
            Step(f"it is {title}", "text_search", query(name, title), reading.lines),
            answer_step(f"it is {reading.read}", reading.read),
        ]

    def comparison_drill(self, world: Counterfactual) -> tuple[str, list[Step]] | None:
        """Two passages, two values, which is larger: an episode from where the images are known."""
        name = self.rng.choice(sorted(COMPARISONS))
        countries = [
            entity["title"]
            for entity, other in self.pairs
            if other == name and entity["kind"] == "country"
        ]
        real1, real2 = self.rng.sample(countries, 2)
        reading1 = self.look_up(real1, name, world)
        reading2 = self.look_up(real2, name, world)
        if reading1.read is None or reading2.read is None:
            return None
        first, second = world(real1), world(real2)
        last = verdict(name, first, reading1.read, second, reading2.read)
        if last is None:
            return None
        question = self.rng.choice(WHICH_OF_TWO).format(COMPARISONS[name])
        thought = f"{name} of {first} is {reading1.read}"
        return question, [
            Step(f"image 2 is {second}", "text_search", query(name, first), reading1.lines),
            Step(thought, "text_search", query(name, second), reading2.lines),
            last,
        ]

    def number_drill(self, count: int = 3) -> list[tuple[str, bool]]:
        """[(text, is it scored)]: `count` verdicts one after the other.

        Cheap practice in comparing numbers: larger for quantities, smaller (older) for years.
        Scored is what compares them, not the values.
        """
        pieces = []
        while len(pieces) < 2 * count:
            drawn = self.drawn_comparison()
            if drawn:
                given, written = drawn
                pieces.append((given, False))
                pieces.append((written, True))
        return pieces

    def drawn_comparison(self) -> tuple[str, str] | None:
        """Two made-up values, and what is to be thought of them; None where they are too close.

        Half of the pairs are of about the same size, so that many digits have to be compared.
        """
        rng = self.rng
        world = Counterfactual(self.names, rng)
        name = rng.choice(sorted(COMPARISONS))
        if "date" in name:
            value1, value2 = (str(rng.randint(*YEARS)) for _ in range(2))
        else:
            decimals = rng.choice([0, 0, 0, 1])
            size = rng.uniform(0, 10)
            size2 = size + rng.choice([rng.uniform(-0.3, 0.3), rng.uniform(-1, 1)])
            value1, value2 = (f"{10 ** max(0, x):,.{decimals}f}" for x in (size, size2))
        first = world(rng.choice(self.names.pools["country"]))
        second = world(rng.choice(self.names.pools["country"]))
        last = verdict(name, first, value1, second, value2)
        if last is None:
            return None
        read = f"{name} of {second} is {value2}"
        given = f"<think> {name} of {first} is {value1}</think><think> {read}"
        return given, last.thought.removeprefix(read) + "</think>"
