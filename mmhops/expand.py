"""Bridging questions by iterative expansion with a language model (the paper's §3), from any single-hop visual question.

    python -m mmhops.expand --seeds seeds.jsonl --kb data/kb --out data/expanded.jsonl --base-url https://api.openai.com/v1 --model gpt-4o

A seed is a picture, a question and an answer that is the title of an article: "Which country's flag is this?", Chad. That
article is the *bridge*. One expansion:

1. **write**  The model reads passages of the bridge's article and writes a sub-question about it, with a short answer.
2. **check**  The sub-question names the bridge and nothing that only a reader of the passage would understand; its answer
   is in the passage; it does not give the answer away.
3. **merge**  The model puts the question so far in the place of the bridge's name: "What is the capital of the country
   whose flag is shown?" No bridge and no answer may be named in it.

The answer may be the next bridge. A question is kept at `--min-steps` to `--max-steps` steps. Whatever fails is counted by
its reason; the report says what was accepted, what it cost, and why the rest was not.

**Comparison** (`--compare N`): pairs of pictured articles near one another in the image encoder's space; the model lists the
numbers of each article, a quantity that both have is compared, and their names are replaced by their pictures. Most ask for
a number (a difference, a ratio; years between), some for the name of the larger.

Every reply is remembered in OUT.calls.jsonl: a run that was stopped asks nothing twice. The model is any endpoint that
speaks OpenAI's protocol; without one, `mmhops/build.py` does the same with the knowledge base's own relations.
"""

import hashlib
import json
import os
import random
import re
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data import DataError, Question, load_questions, write_jsonl
from mmhops.build import answer_fields
from retrieval import IMAGE_CORPUS, IMAGE_INDEX, TEXT_CORPUS, JsonLines
from reward import normalize

WRITE = """Here are passages of the article "{title}":

{passages}

Write one question about {title} that these passages answer. It must contain the name "{title}", must be understood by someone \
who does not see the passages, and must have one short answer (a name, a number or a date) that stands in the passages word for word.
Reply with JSON only: {{"question": "...", "answer": "..."}}"""
MERGE = """Question A: {sub}
Question B, whose answer is "{bridge}": {question}

Rewrite question A so that, instead of the name "{bridge}", it contains a description taken from question B. \
The result is one natural question. It must not contain the name "{bridge}" and must not contain "{answer}".
Reply with JSON only: {{"question": "..."}}"""
QUANTITIES = """Here are passages of the article "{title}":

{passages}

List the numerical quantities of {title} that stand in these passages: short lower-case names with their unit (for example "height in m", \
"year of foundation") and the number as it is written there.
Reply with one flat JSON object only: {{"height in m": "1,234", "year of foundation": "1890"}}"""
COMPARE = {
    "difference": "What is the difference in {} between what the two images show?",
    "ratio": "By what factor do the two things shown in the images differ in {}?",
    "years": "How many years lie between the {} of the two things shown in the images?",
    "name": "Which of the two things shown in the images has the larger {}?",
}
DATE = r"(?:\d{1,2} )?(?:January|February|March|April|May|June|July|August|September|October|November|December)(?: \d{1,2},)?(?: \d{3,4})?|\d{3,4} ?(?:BC|AD)?"


class Rejected(Exception):
    """A candidate that failed a check; the message is the reason."""


class Model:
    """A chat model behind an OpenAI-compatible endpoint; replies are cached in a file, in which a stopped run finds them again."""

    def __init__(
        self,
        base_url: str,
        model: str,
        cache: Path,
        temperature: float = 0.7,
        retries: int = 5,
        max_tokens: int = 300,
    ):
        from openai import OpenAI

        self.client = OpenAI(
            base_url=base_url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            max_retries=retries,
            timeout=120,
        )
        self.model, self.temperature, self.max_tokens, self.path, self.lock = (
            model,
            temperature,
            max_tokens,
            cache,
            threading.Lock(),
        )
        self.calls = self.cached = self.tokens_in = self.tokens_out = 0
        self.replies = {}
        if cache.exists():
            with open(cache, "rb+") as file:
                data = file.read()
                whole = data.rfind(b"\n") + 1
                file.truncate(whole)  # a kill may have torn the last line
            for record in map(json.loads, data[:whole].decode().splitlines()):
                self.replies[record["key"]] = record["reply"]

    def ask(self, prompt: str, attempt: int = 0) -> dict:
        """The JSON object in the model's reply. Raises Rejected where there is none. attempt: asks for another sample."""
        key = hashlib.sha256(
            json.dumps([self.model, self.temperature, self.max_tokens, attempt, prompt]).encode()
        ).hexdigest()
        if key not in self.replies:
            done = self.client.chat.completions.create(
                model=self.model,
                temperature=self.temperature,
                max_tokens=self.max_tokens,
                seed=attempt,
                messages=[{"role": "user", "content": prompt}],
            )
            reply = done.choices[0].message.content or ""
            with self.lock:
                self.calls, self.replies[key] = self.calls + 1, reply
                if done.usage:
                    self.tokens_in, self.tokens_out = (
                        self.tokens_in + done.usage.prompt_tokens,
                        self.tokens_out + done.usage.completion_tokens,
                    )
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "reply": reply}) + "\n")
        else:
            self.cached += 1
        found = re.search(r"\{.*?\}", self.replies[key], re.DOTALL)
        try:
            value = json.loads(found.group()) if found else None
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, dict) or not all(
            isinstance(v, (str, int, float)) for v in value.values()
        ):
            raise Rejected("the reply is not the JSON asked for")
        return {name: str(text).strip() for name, text in value.items()}


class Articles:
    """Passages by title, over a corpus that stays on disk."""

    def __init__(self, kb: Path):
        self.texts, self.rows = JsonLines(kb / TEXT_CORPUS, "contents"), {}
        for row in range(len(self.texts)):
            self.rows.setdefault(self.texts[row].partition("\n")[0], []).append(row)
        self.by_name = {normalize(title): title for title in self.rows}

    def passages(self, title: str, rng: random.Random, count: int = 6) -> list[int]:
        """Rows of an article: its first passage and others drawn at random, in the article's order."""
        rows = self.rows[title]
        return sorted({rows[0], *rng.sample(rows, min(count, len(rows)))})


def mentions(text: str, name: str) -> bool:
    return bool(normalize(name)) and f" {normalize(name)} " in f" {normalize(text)} "


def check_written(sub: dict, title: str, passages: str):
    """The sub-question stands alone, and its answer is in the passages. Raises Rejected."""
    if not sub.get("question") or not sub.get("answer"):
        raise Rejected("the reply is not the JSON asked for")
    if not mentions(sub["question"], title):
        raise Rejected("the sub-question does not name the bridge")
    if re.search(
        r"\b(passages?|text|article|above|according to|mentioned|document)\b",
        sub["question"],
        re.IGNORECASE,
    ):
        raise Rejected("the sub-question speaks of the passage")
    if not 0 < len(sub["answer"].split()) <= 8:
        raise Rejected("the answer is not short")
    if not mentions(passages, sub["answer"]):
        raise Rejected("the answer is not in the passage")
    if mentions(sub["question"], sub["answer"]):
        raise Rejected("the sub-question contains its answer")
    if mentions(title, sub["answer"]) or mentions(sub["answer"], title):
        raise Rejected("the answer is the bridge")


def check_merged(question: str, hidden: list[str], answer: str):
    """The merged question names no entity of the chain and not the answer. Raises Rejected."""
    if not question.endswith("?") or len(question.split()) < 5:
        raise Rejected("the merged question is no question")
    if any(mentions(question, name) for name in hidden):
        raise Rejected("the merged question names a bridge")
    if mentions(question, answer):
        raise Rejected("the merged question contains the answer")
    if not re.search(r"\b(image|picture|photo|shown|depicted|this)\b", question, re.IGNORECASE):
        raise Rejected("the merged question lost the picture")


def typed(answer: str) -> dict:
    """`answer`, `answer_eval`, `problem_type` of a written answer.

    >>> typed("4,000 km")["answer_eval"], typed("12 July 1990")["problem_type"], typed("N'Djamena")["problem_type"]
    (['3600', '4400'], 'Time', 'String')
    """
    number = re.fullmatch(
        r"[$€£]?\s?(-?\d[\d,]*(?:\.\d+)?)\s?(%|[a-zA-Z.]+(?: [a-zA-Z]+)?)?", answer
    )
    if re.fullmatch(DATE, answer):
        return answer_fields({"text": answer, "type": "Time"})
    if number:
        return answer_fields(
            {"text": answer, "type": "Numerical", "value": float(number.group(1).replace(",", ""))}
        )
    return answer_fields({"text": answer, "type": "String"})


def expand(
    seed: Question, model: Model, articles: Articles, steps: int, rng: random.Random, tries: int = 3
) -> dict:
    """A question of `steps` steps from a seed, as an MMhops record. Raises Rejected with the reason of the last failed try."""
    bridge = articles.by_name.get(normalize(seed.answer))
    if bridge is None:
        raise Rejected("the seed's answer has no article")
    question, hidden = seed.problem.replace("<image>", "").strip(), [bridge]
    hops = [vars(hop) | {"rows": list(hop.rows)} for hop in seed.hops] if seed.hops else []
    for depth in range((seed.num_steps or 1) + 1, steps + 1):
        for attempt in range(tries):
            rows = articles.passages(bridge, rng)
            passages = "\n".join(articles.texts[row].partition("\n")[2] for row in rows)
            try:
                sub = model.ask(WRITE.format(title=bridge, passages=passages), attempt)
                check_written(sub, bridge, passages)
                following = articles.by_name.get(normalize(sub["answer"]))
                if depth < steps and (following is None or following in hidden):
                    raise Rejected("the answer is no new bridge")
                merged = model.ask(
                    MERGE.format(
                        sub=sub["question"], bridge=bridge, question=question, answer=sub["answer"]
                    ),
                    attempt,
                )
                check_merged(merged.get("question", ""), hidden, sub["answer"])
                break
            except Rejected:
                if attempt == tries - 1:
                    raise
        gold = [row for row in rows if mentions(articles.texts[row], sub["answer"])]
        hops.append(
            {
                "action": "text_search",
                "about": bridge,
                "relation": "",
                "rows": gold,
                "result": sub["answer"],
                "query": sub["question"],
            }
        )
        question, bridge = merged["question"], following
        hidden.append(sub["answer"])
    return {
        "problem": "<image>" * len(seed.images) + question,
        **typed(sub["answer"]),
        "split": "Bridge",
        "num_steps": steps,
        "hops": hops if seed.hops else None,
        "images": [str(image.resolve()) for image in seed.images],
    }


def quantities(
    model: Model, articles: Articles, title: str, rng: random.Random
) -> dict[str, tuple[float, str, list[int]]]:
    """{quantity: (value, as written, rows that say it)} of an article; only numbers that stand in its passages."""
    rows = articles.passages(title, rng, 10)
    passages, out = "\n".join(articles.texts[row].partition("\n")[2] for row in rows), {}
    for name, text in model.ask(QUANTITIES.format(title=title, passages=passages)).items():
        number = re.match(r"-?\d[\d,]*(?:\.\d+)?", text)
        gold = [row for row in rows if number and mentions(articles.texts[row], number.group())]
        if gold:
            out[" ".join(name.lower().replace("_", " ").split())] = (
                float(number.group().replace(",", "")),
                number.group(),
                gold,
            )
    return out


def compare(pair: list[dict], model: Model, articles: Articles, rng: random.Random) -> dict:
    """A Compare record of two image records of the knowledge base. Raises Rejected."""
    titles = [record["title"] for record in pair]
    if not all(title in articles.rows for title in titles):
        raise Rejected("a pictured article has no passages")
    first, second = (quantities(model, articles, title, rng) for title in titles)
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise Rejected("no shared quantity")
    name = rng.choice(shared)
    (a, written_a, rows_a), (b, written_b, rows_b) = first[name], second[name]
    if min(a, b) <= 0 or "year" not in name and max(a, b) < 1.1 * min(a, b) or a == b:
        raise Rejected("the two are too close")
    ask = "years" if "year" in name else rng.choice(["difference", "difference", "ratio", "name"])
    if ask == "name":
        answer = {"answer": titles[a < b], "answer_eval": [titles[a < b]], "problem_type": "String"}
    else:
        number = round(max(a, b) / min(a, b), 2) if ask == "ratio" else round(abs(a - b), 4)
        answer = answer_fields(
            {"text": f"{number:,.10g}", "type": "Numerical", "value": float(number)}
        )
    problem = COMPARE[ask].format(name)
    if any(mentions(problem, title) for title in titles):
        raise Rejected("the question names an entity")
    hops = [
        {
            "action": "image_search",
            "about": str(i + 1),
            "relation": "",
            "rows": [record["id"]],
            "result": record["title"],
        }
        for i, record in enumerate(pair)
    ]
    hops += [
        {
            "action": "text_search",
            "about": title,
            "relation": name,
            "rows": rows,
            "result": text,
            "query": f"{name} of {title}",
        }
        for title, rows, text in ((titles[0], rows_a, written_a), (titles[1], rows_b, written_b))
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

    index, records = (
        faiss.read_index(str(kb / IMAGE_INDEX), faiss.IO_FLAG_MMAP_IFC),
        JsonLines(kb / IMAGE_CORPUS),
    )
    pairs = []
    for row in rng.sample(range(len(records)), min(count, len(records))):
        near = [
            int(other)
            for other in index.search(index.reconstruct(row)[None], k + 1)[1][0]
            if other not in (row, -1)
        ]
        pairs.append([records[row], records[rng.choice(near)]])
    return pairs


@dataclass
class Args:
    """Expand single-hop visual questions with a language model."""

    seeds: Path | None = (
        None  # any question file that load_questions reads; answers are titles of the KB
    )
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
    tries: int = 3  # samples of one expansion before the seed is given up
    workers: int = 8
    price_in: float = 2.5  # dollars a million tokens
    price_out: float = 10.0
    seed: int = 0


def main(args: Args) -> dict:
    """Write the accepted questions; returns and prints the report."""
    seeds = (
        load_questions(args.seeds, args.split, args.limit, args.shuffle_seed, args.images)
        if args.seeds
        else []
    )
    if not seeds and not args.compare:
        raise DataError("nothing to do: give --seeds FILE, --compare N, or both")
    pairs = similar_pairs(args.kb, args.compare, random.Random(args.seed)) if args.compare else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    articles = Articles(args.kb)
    model = Model(
        args.base_url,
        args.model,
        args.out.with_suffix(".calls.jsonl"),
        args.temperature,
        max_tokens=args.max_tokens,
    )

    def one(job):
        name, seed = job
        rng = random.Random(
            f"{args.seed} {name}"
        )  # the same prompts in every run: the cache knows the replies
        try:
            if isinstance(seed, Question):
                return expand(
                    seed,
                    model,
                    articles,
                    rng.randint(args.min_steps, args.max_steps),
                    rng,
                    args.tries,
                )
            return compare(seed, model, articles, rng) | {
                "images": [str((args.kb / record["image_path"]).resolve()) for record in seed]
            }
        except Rejected as reason:
            return str(reason)

    jobs = [(seed.id, seed) for seed in seeds] + [
        ("compare " + " ".join(str(record["id"]) for record in pair), pair) for pair in pairs
    ]

    from tqdm import tqdm

    with ThreadPoolExecutor(args.workers) as pool:
        results = list(tqdm(pool.map(one, jobs), total=len(jobs), desc="expand"))
    seen, records, reasons = set(), [], Counter()
    for (name, _), result in zip(jobs, results):
        mark = result if isinstance(result, str) else (result["problem"], *result["images"])
        if isinstance(result, str) or mark in seen:
            reasons[result if isinstance(result, str) else "duplicate"] += 1
        else:
            seen.add(mark)
            records.append(
                {"id": f"{name}_expanded".replace(" ", "_")}
                | {k: v for k, v in result.items() if v is not None}
            )
    write_jsonl(args.out, records)
    report = {
        "seeds": len(seeds),
        "pairs": len(pairs),
        "accepted": len(records),
        "acceptance_rate": round(len(records) / len(jobs), 4),
        "rejected": dict(reasons.most_common()),
        "calls": model.calls,
        "calls_remembered": model.cached,
        "tokens_in": model.tokens_in,
        "tokens_out": model.tokens_out,
        "dollars": round(
            (model.tokens_in * args.price_in + model.tokens_out * args.price_out) / 1e6, 4
        ),
    }
    print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if type(error).__module__.startswith("openai"):
            sys.exit(
                f"error: the model's endpoint failed ({type(error).__name__}: {error}); what it has answered is kept, type the command again"
            )
        raise
