"""Bridge questions by iterative expansion with a language model (MMhops).

    python -m mmhops.expand --seeds seeds.jsonl --kb data/kb --model gpt-4o --out data/x.jsonl

A seed is a visual question whose answer is the title of an article: "Which country's flag is
this?", Chad. That article is the *bridge*. One expansion: the model **writes** a sub-question and
its short answer from the bridge's passages; both are **checked**; the model **merges**, putting the
question so far in the place of the bridge's name: "What is the capital of the country whose flag is
shown?" The answer may be the next bridge. At the end the model is asked whether it doubts what it
wrote; `mmhops/judge.py` says how often it is right in that. `--compare N`: comparisons of two
pictured articles, too.

The model is any endpoint that speaks OpenAI's protocol; `mmhops/build.py` needs none.
"""

import hashlib
import json
import random
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data import DataError, Question, load_questions
from engine.endpoint import complete, open_client, text_of
from files.records import (
    FAULTS,
    cut_torn_line,
    read_jsonl,
    without_halves,
    write_jsonl,
)
from files.rows import JsonLines
from files.terminal import fail
from mmhops.build import answer_fields, number_fields
from retrieval import IMAGE_CORPUS, IMAGE_INDEX, TEXT_CORPUS
from reward import normalize

WRITE = """Here are passages of the article "{title}":

{passages}

Write one question about {title} that these passages answer. \
It must contain the name "{title}", must be understood by someone \
who does not see the passages, and must have one short answer (a name, a number or a date) \
that stands in the passages word for word.
Reply with JSON only: {{"question": "...", "answer": "..."}}"""
MERGE = """Question A: {sub}
Question B, whose answer is "{bridge}": {question}

Rewrite question A so that, instead of the name "{bridge}", \
it contains a description taken from question B. \
The result is one natural question. \
It must not contain the name "{bridge}" and must not contain "{answer}".
Reply with JSON only: {{"question": "..."}}"""
CHECK = """Here are passages of the article "{title}":

{passages}

Question: {sub}
Proposed answer: {answer}

The same question, asked about a picture: {question}

Check three things. "follows": do the passages give the proposed answer? \
"unique": is it the only right answer? \
"guessable": could someone answer the question about the picture \
without finding out that it is about "{title}"?
Reply with JSON only, each "yes" or "no": \
{{"follows": "yes", "unique": "yes", "guessable": "no"}}"""
GOOD = {"follows": "yes", "unique": "yes", "guessable": "no"}  # the verdict on a good question
QUANTITIES = """Here are passages of the article "{title}":

{passages}

List the numerical quantities of {title} that stand in these passages: \
short lower-case names with their unit (for example "height in m", \
"year of foundation") and the number as it is written there.
Reply with one flat JSON object only: {{"height in m": "1,234", "year of foundation": "1890"}}"""
COMPARISON_SENTENCES = {
    "difference": "What is the difference in {} between what the two images show?",
    "ratio": "By what factor do the two things shown in the images differ in {}?",
    "years": "How many years lie between the {} of the two things shown in the images?",
    "name": "Which of the two things shown in the images has the larger {}?",
}
DATE = (
    r"(?:\d{1,2} )?"
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December)"
    r"(?: \d{1,2},)?(?: \d{3,4})?"
    r"|(?:1\d|20)\d\d|\d{1,4} ?(?:BCE?|CE|AD)"
)
# "1990s" and "19th" are no quantities: the metric would allow a tenth more or less.
QUANTITY = (
    r"[$€£]?\s?(-?\d[\d,]*(?:\.\d+)?)(?!s\b|st\b|nd\b|rd\b|th\b)"
    r"\s?(%|[a-zA-Z.]+(?: [a-zA-Z]+)?)?"
)
SCALES = r"\b(hundred|thousand|million|billion|trillion)s?\b"
SPEAKS_OF_THE_PASSAGE = r"\b(passages?|text|article|above|according to|mentioned|document)\b"
SPEAKS_OF_THE_PICTURE = r"\b(image|picture|photo|shown|depicted|this)\b"


Check = Literal["reject", "record", "none"]


class Rejected(Exception):
    """A candidate that failed a check; the message is the reason."""


# ------------------------------------------------------------------------------ model and articles


class Model:
    """A chat model behind an OpenAI-compatible endpoint.

    Every reply is kept in the file `cache`, one JSON line per reply: a run that was stopped asks
    nothing twice. Calls may come from several threads.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        cache: Path,
        temperature: float = 0.7,
        retries: int = 5,
        max_tokens: int = 300,
    ):
        self.client = open_client(base_url, retries, seconds=120)
        self.model = model
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.cache = cache
        self.lock = threading.Lock()
        self.calls = 0
        self.remembered = 0  # replies that were found in the cache
        self.tokens_in = 0
        self.tokens_out = 0
        self.replies = read_replies(cache)

    def ask(self, prompt: str, attempt: int = 0) -> dict[str, str]:
        """The JSON object in the model's reply. Raises Rejected where there is none.

        attempt: the same prompt with another number is another sample.
        """
        identity = [self.model, self.temperature, self.max_tokens, attempt, prompt]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        if key in self.replies:
            self.remembered += 1
        else:
            self.call(key, prompt, attempt)
        return parse_object(self.replies[key])

    def call(self, key: str, prompt: str, attempt: int):
        """Ask the endpoint, and keep the reply in memory and in the file."""
        done = complete(
            self.client,
            model=self.model,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            seed=attempt,
            messages=[{"role": "user", "content": prompt}],
        )
        reply = text_of(done)
        with self.lock:
            self.calls += 1
            self.replies[key] = reply
            if done.usage:
                self.tokens_in += done.usage.prompt_tokens
                self.tokens_out += done.usage.completion_tokens
            with open(self.cache, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "reply": reply}) + "\n")


def read_replies(cache: Path) -> dict[str, str]:
    """{key: reply} of an earlier run's file. A last line that a kill has torn is cut off.

    Raises DataError, naming the line, where another one is no reply.
    """
    if not cache.exists():
        return {}
    cut_torn_line(cache)
    replies = {}
    for number, record in read_jsonl(cache):
        key, reply = record.get("key"), record.get("reply")
        if not isinstance(key, str) or not isinstance(reply, str):
            raise DataError(f"{cache}:{number}: no reply of a model; delete the line")
        replies[key] = reply
    return replies


def parse_object(reply: str) -> dict[str, str]:
    """The first flat JSON object in a reply, its values as text. Raises Rejected.

    >>> parse_object('Sure! {"question": "How old?", "answer": 12}')
    {'question': 'How old?', 'answer': '12'}
    """
    start = max(0, reply.find("{"))
    end = reply.find("}", start) + 1
    try:
        value = without_halves(json.loads(reply[start:end]))
    except (ValueError, RecursionError):  # no JSON; a number of thousands of digits; too deep
        value = None
    if not isinstance(value, dict):
        raise Rejected("the reply is not the JSON asked for")
    if not all(isinstance(text, (str, int, float)) for text in value.values()):
        raise Rejected("the reply is not the JSON asked for")
    if "<image>" in reply:  # in a question it would be one picture more
        raise Rejected("the reply holds a tag")
    return {name: str(text).strip() for name, text in value.items()}


class Articles:
    """Passages by title, over a corpus that stays on disk.

    rows: {title: its rows}; by_name: {normalised title: title}.
    """

    def __init__(self, kb: Path):
        self.texts = JsonLines(kb / TEXT_CORPUS, "contents")
        self.rows = {}
        for row in range(len(self.texts)):
            title = self.texts[row].partition("\n")[0]
            self.rows.setdefault(title, []).append(row)
        self.by_name = {normalize(title): title for title in self.rows}

    def draw(self, title: str, rng: random.Random, count: int = 6) -> list[int]:
        """Rows of an article: its first passage and `count` drawn at random, in its order."""
        rows = self.rows[title]
        return sorted({rows[0], *rng.sample(rows, min(count, len(rows)))})

    def passages(self, rows: list[int]) -> str:
        """The passages without their title, one per line."""
        return "\n".join(self.texts[row].partition("\n")[2] for row in rows)

    def rows_that_say(self, text: str, rows: list[int]) -> list[int]:
        return [row for row in rows if mentions(self.texts[row], text)]


# ------------------------------------------------------------------------------ the checks


def mentions(text: str, name: str) -> bool:
    """Does a name stand in a text, as whole words, whatever its case, punctuation and articles?

    >>> mentions("Which river crosses the Gambia?", "Gambia, The"), mentions("Chadwick", "Chad")
    (True, False)
    >>> mentions("What is Chad's capital?", "Chad")
    True
    """
    name, text = (normalize(re.sub(r"['’]s\b", "", said)) for said in (name, text))
    return bool(name) and f" {name} " in f" {text} "


def check_written(sub: dict, title: str, passages: str):
    """The sub-question stands alone, and its answer is in the passages. Raises Rejected."""
    if not sub.get("question") or not sub.get("answer"):
        raise Rejected("the reply is not the JSON asked for")
    question, answer = sub["question"], sub["answer"]
    if not mentions(question, title):
        raise Rejected("the sub-question does not name the bridge")
    if re.search(SPEAKS_OF_THE_PASSAGE, question, re.IGNORECASE):
        raise Rejected("the sub-question speaks of the passage")
    if not 0 < len(answer.split()) <= 8:
        raise Rejected("the answer is not short")
    if not mentions(passages, answer):
        raise Rejected("the answer is not in the passage")
    if mentions(question, answer):
        raise Rejected("the sub-question contains its answer")
    if mentions(title, answer) or mentions(answer, title):
        raise Rejected("the answer is the bridge")


def check_merged(question: str, hidden: list[str], answer: str):
    """The merged question asks about a picture, and names no hidden entity and not the answer.

    Raises Rejected.
    """
    if not question.endswith("?") or len(question.split()) < 5:
        raise Rejected("the merged question is no question")
    if any(mentions(question, name) for name in hidden):
        raise Rejected("the merged question names a bridge")
    if mentions(question, answer):
        raise Rejected("the merged question contains the answer")
    if not re.search(SPEAKS_OF_THE_PICTURE, question, re.IGNORECASE):
        raise Rejected("the merged question lost the picture")


def typed(answer: str) -> dict:
    """`answer`, `answer_eval`, `problem_type` of a written answer.

    >>> typed("4,000 km")["answer_eval"]
    ['3600', '4400']
    >>> [typed(answer)["problem_type"] for answer in ("12 July 1990", "1890", "44 BC", "324")]
    ['Time', 'Time', 'Time', 'Numerical']
    >>> [typed(answer)["problem_type"] for answer in ("N'Djamena", "1990s", "19th century")]
    ['String', 'String', 'String']
    >>> typed("5.2 million people")["problem_type"]  # the metric would read it as 5.21000000
    'String'
    """
    if re.fullmatch(DATE, answer):
        return answer_fields({"text": answer, "type": "Time"})
    quantity = re.fullmatch(QUANTITY, answer)
    if quantity and not re.search(SCALES, answer, re.IGNORECASE):
        value = float(quantity.group(1).replace(",", ""))
        return answer_fields({"text": answer, "type": "Numerical", "value": value})
    return answer_fields({"text": answer, "type": "String"})


def verdict_on(
    model: Model, title: str, passages: str, sub: str, answer: str, question: str
) -> dict[str, str]:
    """What a language model says of a question's last step: {"follows", "unique", "guessable"},
    each "yes", "no", or "" where it does not say. Raises Rejected where the reply is no JSON.
    """
    reply = model.ask(
        CHECK.format(title=title, passages=passages, sub=sub, answer=answer, question=question)
    )
    said = {name: reply.get(name, "").strip().lower() for name in GOOD}
    return {name: word if word in ("yes", "no") else "" for name, word in said.items()}


# ------------------------------------------------------------------------------ bridge questions


@dataclass
class Expansion:
    """One step more."""

    question: str  # merged: the whole question, down to the picture
    answer: str
    following: str | None  # title of the answer's article, where it has one
    hop: dict
    passages: str  # that the sub-question was written from


def expand_once(
    question: str,
    bridge: str,
    hidden: list[str],
    last: bool,
    model: Model,
    articles: Articles,
    rng: random.Random,
    attempt: int,
) -> Expansion:
    """`question`, whose answer is `bridge`, grown by one step. Raises Rejected.

    hidden: names that the grown question must not contain. last: no further step is wanted, so the
    answer need not be an article.
    """
    # 1) Write.
    rows = articles.draw(bridge, rng)
    passages = articles.passages(rows)
    sub = model.ask(WRITE.format(title=bridge, passages=passages), attempt)

    # 2) Check.
    check_written(sub, bridge, passages)
    answer = sub["answer"]
    following = articles.by_name.get(normalize(answer))
    names = {normalize(name) for name in hidden}
    if following in hidden or normalize(answer) in names or (not last and following is None):
        raise Rejected("the answer is no new bridge")

    # 3) Merge.
    merge = MERGE.format(sub=sub["question"], bridge=bridge, question=question, answer=answer)
    merged = model.ask(merge, attempt).get("question", "")
    check_merged(merged, hidden, answer)
    hop = {
        "action": "text_search",
        "about": bridge,
        "relation": "",
        "rows": articles.rows_that_say(answer, rows),
        "result": answer,
        "query": sub["question"],
    }
    return Expansion(merged, answer, following, hop, passages)


def expand(
    seed: Question,
    model: Model,
    articles: Articles,
    steps: int,
    rng: random.Random,
    tries: int = 3,
    check: Check = "reject",
) -> dict:
    """A question of `steps` steps from a seed, as an MMhops record.

    tries: samples of one step before the seed is given up. check: what is done with the model's own
    verdict on the question: one that is doubted is rejected, or kept with its verdict. Raises
    Rejected with the reason of the
    last one, or where the seed is of no use.
    """
    # 1) The seed: its answer is the first bridge.
    bridge = articles.by_name.get(normalize(seed.answer))
    if bridge is None:
        raise Rejected("the seed's answer has no article")
    seed_steps = seed.num_steps or 1
    if seed_steps >= steps:
        raise Rejected("the seed has enough steps already")
    question = seed.problem.replace("<image>", "").strip()
    hops = [vars(hop) | {"rows": list(hop.rows)} for hop in seed.hops or ()]
    # No question may name one of these: what the seed's own steps found on the way to its answer,
    # as far as its file says; its answer; and every answer found since.
    hidden = [*seed.passed, *(hop.result for hop in seed.hops or ()), bridge]

    # 2) Grow, step by step.
    for depth in range(seed_steps + 1, steps + 1):
        for attempt in range(tries):
            try:
                grown = expand_once(
                    question, bridge, hidden, depth == steps, model, articles, rng, attempt
                )
                break
            except Rejected:
                if attempt == tries - 1:
                    raise
        question = grown.question
        bridge = grown.following
        hidden.append(grown.answer)
        hops.append(grown.hop)

    # 3) A second look at the last step.
    verdict = None
    if check != "none":
        hop = grown.hop
        given = (hop["about"], grown.passages, hop["query"], grown.answer, question)
        verdict = verdict_on(model, *given)
        if check == "reject" and verdict != GOOD:
            doubts = [name for name in GOOD if verdict[name] != GOOD[name]]
            raise Rejected(f"the check doubts: {', '.join(doubts)}")

    # 4) The record. A chain whose beginning is not known is left out.
    return {
        "problem": "<image>" * len(seed.images) + question,
        **typed(grown.answer),
        "split": "Bridge",
        "num_steps": steps,
        "hops": hops if seed.hops else None,
        "images": [str(image.resolve()) for image in seed.images],
        "verdict": verdict,
    }


# ------------------------------------------------------------------------------ comparisons


@dataclass
class Quantity:
    """A number that an article gives."""

    value: float
    written: str  # as it stands there
    rows: list[int]  # of the passages that say it


def quantities(
    model: Model, articles: Articles, title: str, rng: random.Random
) -> dict[str, Quantity]:
    """{name with unit: quantity} of an article; only numbers that stand in its passages."""
    rows = articles.draw(title, rng, 10)
    prompt = QUANTITIES.format(title=title, passages=articles.passages(rows))
    found = {}
    for name, text in model.ask(prompt).items():
        number = re.match(r"-?\d[\d,]*(?:\.\d+)?", text)
        if not number or re.search(SCALES, f"{name} {text}", re.IGNORECASE):
            continue  # the other article may write 5,200,000 for 5.2 million
        written = number.group()
        gold = articles.rows_that_say(written, rows)
        if gold:
            name = " ".join(name.lower().replace("_", " ").split())
            found[name] = Quantity(float(written.replace(",", "")), written, gold)
    return found


def names_a_year(name: str) -> bool:
    """Is a quantity of this name a year, whose differences are counted in years?

    >>> names_a_year("year of completion"), names_a_year("founding year")
    (True, True)
    >>> names_a_year("median age in years"), names_a_year("visitors per year")
    (False, False)
    """
    return bool(re.search(r"^year\b|(?<!per )\byear$", name))


def written_comparison(
    pair: list[dict], model: Model, articles: Articles, rng: random.Random
) -> dict:
    """A Compare record, without its images, of two records of the image corpus. Raises Rejected.

    Most ask for a number (a difference, a ratio, years between), some for the name of the larger.
    """
    titles = [record["title"] for record in pair]
    if not all(title in articles.rows for title in titles):
        raise Rejected("a pictured article has no passages")

    # 1) A quantity that both have, far enough apart.
    first, second = (quantities(model, articles, title, rng) for title in titles)
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise Rejected("no shared quantity")
    name = rng.choice(shared)
    found = [first[name], second[name]]
    smaller, larger = sorted(quantity.value for quantity in found)
    is_year = names_a_year(name)
    if smaller <= 0 or smaller == larger or (not is_year and larger < 1.1 * smaller):
        raise Rejected("the two are too close")

    # 2) The question and its answer.
    ask = "years" if is_year else rng.choice(["difference", "difference", "ratio", "name"])
    problem = COMPARISON_SENTENCES[ask].format(name)
    if any(mentions(problem, title) for title in titles):
        raise Rejected("the question names an entity")
    if ask == "name":
        winner = titles[0] if found[0].value == larger else titles[1]
        answer = {"answer": winner, "answer_eval": [winner], "problem_type": "String"}
    elif ask == "ratio":
        answer = number_fields(round(larger / smaller, 2))
    else:
        answer = number_fields(round(larger - smaller, 4))

    # 3) The chain: two pictures, then two articles.
    hops = [
        {
            "action": "image_search",
            "about": str(number),
            "relation": "",
            "rows": [record["id"]],
            "result": record["title"],
        }
        for number, record in enumerate(pair, 1)
    ]
    hops += [
        {
            "action": "text_search",
            "about": title,
            "relation": name,
            "rows": quantity.rows,
            "result": quantity.written,
            "query": f"{name} of {title}",
        }
        for title, quantity in zip(titles, found)
    ]
    return {
        "problem": "<image><image>" + problem,
        **answer,
        "split": "Compare",
        "num_steps": 4,
        "hops": hops,
    }


def similar_pairs(kb: Path, count: int, rng: random.Random, k: int = 10) -> list[list[dict]]:
    """`count` pairs of image records, each with one of its k nearest in the image index."""
    import faiss

    index = faiss.read_index(str(kb / IMAGE_INDEX), faiss.IO_FLAG_MMAP_IFC)
    records = JsonLines(kb / IMAGE_CORPUS)
    pairs = []
    for row in rng.sample(range(len(records)), min(count, len(records))):
        vector = index.reconstruct(row)[None]  # (1, d)
        _, nearest = index.search(vector, k + 1)  # (1, k + 1) rows; -1 where there are fewer
        near = [int(other) for other in nearest[0] if other not in (row, -1)]
        if near:
            pairs.append([records[row], records[rng.choice(near)]])
    return pairs


# ------------------------------------------------------------------------------ settings


@dataclass
class Args:
    """Expand single-hop visual questions with a language model."""

    seeds: Path | None = None  # any question file we read; answers are titles of the KB
    out: Path = Path("data/expanded.jsonl")
    kb: Path = Path("data/kb")
    compare: int = 0  # pairs to compare, besides
    split: str = "train"
    images: Path | None = None
    limit: int | None = None
    shuffle_seed: int | None = None
    base_url: str = "https://api.openai.com/v1"  # the key is read from OPENAI_API_KEY
    model: str = "gpt-4o"
    temperature: float = 0.7
    max_tokens: int = 300
    min_steps: int = 3
    max_steps: int = 4
    max_turns: int = 4  # T of the policy: more steps it cannot take
    tries: int = 3  # samples of one expansion before the seed is given up
    check: Check = "reject"  # questions that the model doubts; or record its verdict, or do not ask
    workers: int = 8
    price_in: float = 2.5  # dollars per million tokens
    price_out: float = 10.0
    seed: int = 0


# ------------------------------------------------------------------------------ the command


def model_of(args: Args) -> Model:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    cache = args.out.with_suffix(".calls.jsonl")
    return Model(args.base_url, args.model, cache, args.temperature, max_tokens=args.max_tokens)


def record_or_reason(
    name: str, job: Question | list[dict], args: Args, model: Model, articles: Articles
) -> dict | Rejected:
    """The record of a job, a seed or a pair of image records, or why there is none."""
    # Drawn from the job's own name, the prompts are the same in every run: the cache knows them.
    rng = random.Random(f"{args.seed} {name}")
    try:
        if isinstance(job, Question):
            steps = rng.randint(args.min_steps, args.max_steps)
            return expand(job, model, articles, steps, rng, args.tries, args.check)
        images = [str((args.kb / record["image_path"]).resolve()) for record in job]
        return written_comparison(job, model, articles, rng) | {"images": images}
    except Rejected as reason:
        return reason


def main(args: Args) -> dict:
    """Write the accepted questions; returns and prints the report."""
    from tqdm import tqdm

    # 1) The jobs: (name, seed or pair).
    if not args.min_steps <= args.max_steps <= args.max_turns:
        raise DataError(
            f"--min-steps {args.min_steps} --max-steps {args.max_steps}: the first must not be the "
            f"larger one, and a policy of T = {args.max_turns} (--max-turns) cannot take more steps"
        )
    seeds, pairs = [], []
    if args.seeds:
        seeds = load_questions(args.seeds, args.split, args.limit, args.shuffle_seed, args.images)
    if not seeds and not args.compare:
        raise DataError("nothing to do: give --seeds FILE, --compare N, or both")
    if args.compare:
        pairs = similar_pairs(args.kb, args.compare, random.Random(args.seed))
    jobs = [(seed.id, seed) for seed in seeds]
    for pair in pairs:
        jobs.append(("compare " + " ".join(str(record["id"]) for record in pair), pair))
    if not jobs:
        raise DataError(f"nothing to do: {args.kb} has no two pictures to compare")

    # 2) Several at a time: what takes long is waiting for the model.
    articles = Articles(args.kb)
    model = model_of(args)
    with ThreadPoolExecutor(args.workers) as pool:
        results = pool.map(lambda job: record_or_reason(*job, args, model, articles), jobs)
        results = list(tqdm(results, total=len(jobs), desc="expand"))

    # 3) Keep what was accepted, once; count what was not, by its reason.
    records, reasons, seen = [], Counter(), set()
    for (name, _), result in zip(jobs, results):
        if isinstance(result, Rejected):
            reasons[str(result)] += 1
            continue
        identity = (result["problem"], *result["images"])
        if identity in seen:
            reasons["duplicate"] += 1
            continue
        seen.add(identity)
        known = {key: value for key, value in result.items() if value is not None}
        records.append({"id": f"{name}_expanded".replace(" ", "_")} | known)
    write_jsonl(args.out, records)

    # 4) Report.
    dollars = (model.tokens_in * args.price_in + model.tokens_out * args.price_out) / 1e6
    report = {
        "seeds": len(seeds),
        "pairs": len(pairs),
        "accepted": len(records),
        "acceptance_rate": round(len(records) / len(jobs), 4),
        "rejected": dict(reasons.most_common()),
        "calls": model.calls,
        "calls_remembered": model.remembered,
        "tokens_in": model.tokens_in,
        "tokens_out": model.tokens_out,
        "dollars": round(dollars, 4),
    }
    print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except FAULTS as error:
        fail(error)
