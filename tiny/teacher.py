"""The teacher: scripted episodes over what the retriever really finds, each in a counterfactual world of its own.

It knows the gold chain of a question, and follows it well or badly:

- `good`       every hop is looked up, every name is read where it stands
- `early`      at some turn it answers with a guess instead of going on
- `malformed`  at some turn a tag is missing; the next turn repeats it properly
- `wrong`      a hop in the middle is left out; a comparison is answered without looking anything up

Where the retriever does not find the passage, the teacher says "I will guess" and guesses: it never pretends to have read.
"""

import random
import re

import rollout
from data import Question
from mmhops.build import Graph as World
from mmhops.phrases import ATTRIBUTES, COMPARISONS, RELATIONS, query
from mmhops.phrases import WHICH_OF_TWO as PAIR
from retrieval import Hit, KnowledgeBase
from tiny.counterfactual import Counterfactual, Names


def say(thought: str, action: str, argument: str) -> str:
    return f"<think> {thought}</think><{action}> {argument}</{action}>"


def broken(text: str, rng: random.Random) -> str:
    """The turn with one of its tags missing."""
    return rng.choice(
        [
            lambda: text.replace("</think>", ""),
            lambda: text.replace("<think>", ""),
            lambda: re.sub(r"<think>.*</think>", "", text),
            lambda: re.sub(r"</(image_search|text_search|answer)>", "", text),
        ]
    )()


class Teacher:
    """Writes episodes: [(policy's text, lines that come back or None)]. It reads what the retriever really finds."""

    def __init__(self, kb: KnowledgeBase, world: World, topk: int, seed: int = 0):
        self.kb, self.world, self.topk, self.rng, self.names = (
            kb,
            world,
            topk,
            random.Random(seed),
            Names(world),
        )
        self.by_title = {entity["title"]: entity for entity in world.entities.values()}
        self.pairs = [
            (entity, name)
            for entity in world.entities.values()
            for name in {**entity["relations"], **entity["attributes"]}
            if name in RELATIONS or name in ATTRIBUTES
        ]
        self.found = dict(
            zip(
                [(entity["title"], name) for entity, name in self.pairs],
                kb.text_search([query(name, entity["title"]) for entity, name in self.pairs], topk),
            )
        )

    def hits(self, title: str, name: str) -> list[Hit]:
        if (title, name) not in self.found:
            self.found[title, name] = self.kb.text_search([query(name, title)], self.topk)[0]
        return self.found[title, name]

    def look_up(self, title: str, name: str, w: Counterfactual):
        """(lines, result as it is written there or None) of searching for a relation or attribute of a real title."""
        hits, entity = (
            self.hits(title, name),
            self.by_title.get(title, {"relations": {}, "attributes": {}}),
        )
        lines = rollout.text_lines(
            [Hit(w(hit.title), w(hit.text), hit.score, hit.row) for hit in hits]
        )
        if name not in entity["relations"] and name not in entity["attributes"]:
            return lines, None, None
        hop = self.world.text_hop(entity, name)
        shown = any(
            hit.row in hop["rows"] and w(hop["result"]) in line for hit, line in zip(hits, lines)
        )
        return lines, (w(hop["result"]) if shown else None), hop["result"]

    def guess(self, question: Question, w: Counterfactual) -> str:
        """An answer of the right kind, from nowhere."""
        if question.split == "Compare":
            return w(self.rng.choice(self.names.pools["country"]))
        name = question.hops[-1].relation
        return w(
            self.rng.choice(
                [
                    entity["attributes"][name]["text"]
                    for entity, other in self.pairs
                    if other == name
                ]
            )
        )

    def steps(self, question: Question, style: str, w: Counterfactual):
        """Yield (thought, action, argument, lines, result); the answer step has no lines. None where a reading fails."""
        if question.split == "Compare":
            yield from self.compare_steps(question, style, w)
            return
        hops = list(question.hops)
        if style == "wrong" and len(hops) > 2:
            hops.pop(self.rng.randrange(1, len(hops) - 1))
        real, read = hops[0].result, w(hops[0].result)
        yield (
            "identify image 1",
            "image_search",
            "image 1",
            rollout.image_lines(1, [Hit(read, "", 0.0, 0)]),
        )
        for hop in hops[1:]:
            lines, result, next_real = self.look_up(real, hop.relation, w)
            yield f"it is {read}", "text_search", query(hop.relation, read), lines
            if result is None:
                yield "I will guess", "answer", self.guess(question, w), None
                return
            real, read = next_real, result
        yield f"it is {read}", "answer", read, None

    def compare_steps(self, question: Question, style: str, w: Counterfactual):
        first, second, name = (
            question.hops[0].result,
            question.hops[1].result,
            question.hops[2].relation,
        )
        yield (
            "identify image 1",
            "image_search",
            "image 1",
            rollout.image_lines(1, [Hit(w(first), "", 0.0, 0)]),
        )
        yield (
            f"image 1 is {w(first)}",
            "image_search",
            "image 2",
            rollout.image_lines(2, [Hit(w(second), "", 0.0, 0)]),
        )
        (lines1, value1, _), (lines2, value2, _) = (
            self.look_up(first, name, w),
            self.look_up(second, name, w),
        )
        if style == "wrong":
            yield f"image 2 is {w(second)}", "answer", self.rng.choice([w(first), w(second)]), None
            return
        yield f"image 2 is {w(second)}", "text_search", query(name, w(first)), lines1
        if value1 is None or value2 is None:
            yield "I will guess", "answer", self.rng.choice([w(first), w(second)]), None
            return
        yield f"{name} of {w(first)} is {value1}", "text_search", query(name, w(second)), lines2
        yield from self.verdict(name, w(first), value1, w(second), value2)

    def verdict(self, name, first, value1, second, value2):
        """The comparison, in the thought; nothing where the numbers are closer than the questions' are."""
        if "date" in name:
            value1, value2 = value1[-4:], value2[-4:]
        a, b = (float(re.sub(r"[^\d.]", "", value)) for value in (value1, value2))
        if a != b and ("date" in name or max(a, b) >= 1.1 * min(a, b)):
            winner = first if (a > b) != ("date" in name) else second
            yield f"{first} {value1} and {second} {value2} so {winner}", "answer", winner, None

    def number_drill(self, count: int = 6):
        """[(text, is it scored)]: verdicts one after the other, of which only the winner is scored. Cheap practice in
        comparing numbers: larger for quantities, smaller (older) for years, as in the questions."""
        out, rng = [], self.rng
        while len(out) < 2 * count:
            w, date = Counterfactual(self.names, rng), rng.random() < 0.15
            digits = rng.randint(1, 10)
            values = [
                str(rng.randint(1500, 2030))
                if date
                else f"{rng.randint(10 ** (d - 1), 10**d - 1):,}"
                + rng.choice(["", f".{rng.randint(0, 9)}"])
                for d in (digits, max(1, digits + rng.choice([-1, 0, 0, 1])))
            ]
            names = [w(rng.choice(self.names.pools["country"])) for _ in range(2)]
            for thought, _, winner, _ in self.verdict(
                "date" if date else "", names[0], values[0], names[1], values[1]
            ):
                out += [
                    ("<think> " + thought.removesuffix(winner).rstrip(), False),
                    (f" {winner}</think>", True),
                ]
        return out

    def episode(self, question: Question, style: str, max_turns: int) -> list | None:
        """A whole episode in a world of its own, at most max_turns + 1 turns; None where it came to nothing."""
        w, rng, out = Counterfactual(self.names, self.rng), self.rng, []
        stop_at = rng.randrange(question.num_steps) if style == "early" else None
        break_at = rng.randrange(question.num_steps + 1) if style == "malformed" else None
        for phase, (thought, action, argument, lines) in enumerate(self.steps(question, style, w)):
            if phase == stop_at or len(out) == max_turns and action != "answer":
                thought, action, argument, lines = (
                    "I will guess",
                    "answer",
                    self.guess(question, w),
                    None,
                )
            text = say(thought, action, argument)
            if phase == break_at and len(out) < max_turns:
                bad = broken(text, rng)
                if rollout.parse_turn(bad).kind == "invalid":
                    out.append(
                        (
                            bad,
                            [
                                "No action was found. Think, then search or answer, each in its tags."
                            ],
                        )
                    )
                    if len(out) == max_turns and action != "answer":
                        thought, action, argument, lines = (
                            "I will guess",
                            "answer",
                            self.guess(question, w),
                            None,
                        )
                        text = say(thought, action, argument)
                else:
                    text = bad
            out.append((text, lines))
            if action == "answer":
                return out
        return None

    def drill(self) -> tuple[str, list] | None:
        """(question, episode) of one look-up, text only; every fourth is a comparison."""
        w, rng = Counterfactual(self.names, self.rng), self.rng
        if rng.random() < 0.25:
            name = rng.choice(sorted(COMPARISONS))
            first, second = rng.sample(
                [
                    entity["title"]
                    for entity, other in self.pairs
                    if other == name and entity["kind"] == "country"
                ],
                2,
            )
            (lines1, value1, _), (lines2, value2, _) = (
                self.look_up(first, name, w),
                self.look_up(second, name, w),
            )
            if value1 is None or value2 is None:
                return None
            end = list(self.verdict(name, w(first), value1, w(second), value2))
            return end and (
                rng.choice(PAIR).format(COMPARISONS[name]),
                [
                    (say(f"image 2 is {w(second)}", "text_search", query(name, w(first))), lines1),
                    (
                        say(
                            f"{name} of {w(first)} is {value1}",
                            "text_search",
                            query(name, w(second)),
                        ),
                        lines2,
                    ),
                    (say(*end[0][:3]), None),
                ],
            )
        entity, name = rng.choice(self.pairs)
        lines, result, _ = self.look_up(entity["title"], name, w)
        if result is None:
            return None
        title = w(entity["title"])
        text = (
            f"What is {rng.choice(RELATIONS[name]).format(title)}?"
            if name in RELATIONS
            else rng.choice(ATTRIBUTES[name]).format(title)
        )
        return text, [
            (say(f"it is {title}", "text_search", query(name, title)), lines),
            (say(f"it is {result}", "answer", result), None),
        ]
