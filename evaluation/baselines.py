"""What the agent is compared with: the same policy, or another, used in the ways of earlier work.

    agent       as trained: it plans every turn                              MMhops-R1
    prompted    an untrained policy, the task written out in its prompt      OmniSearch
    direct      no tools: think, then answer                                 the plain model
    static      always: look up every picture, search text once, answer      Wiki-LLaVA
    static-rerank   the same, reading the pictured articles alone            EchoSight
    text-only   text search alone; of a picture at most a caption            Search-R1,
                and `train.py --mode text-only` trains it                    as it was trained

Any of these runs behind an OpenAI-compatible endpoint as well (`--base-url`, `--model`).
"""

import base64
import io
import json
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from data import DataError, Question, load_questions
from engine.endpoint import Endpoint, EndpointSampler
from engine.text import escape, message_texts, observation_ids, plain_ids, tagged, trusted_ids
from evaluation.ask import put_back, set_aside
from evaluation.summary import image_hits
from files.images import open_image
from files.rows import JsonLines
from model import Policy
from retrieval import Hit, KnowledgeBase, passage_hit
from rollout import (
    ACTIONS,
    INSTRUCTIONS,
    NOTHING_FOUND,
    SEARCHES,
    Response,
    RolloutConfig,
    Turn,
    gold_hits,
    image_lines,
    run_episodes,
    sample,
    text_lines,
)

Mode = Literal["agent", "prompted", "direct", "static", "static-rerank", "text-only"]
FIXED = ("static", "static-rerank")
WITHOUT_TOOLS = (
    "Answer the question about the image{}. First think between <think> and </think>, then give a "
    "short answer, without explanation, as <answer>answer</answer>.\nQuestion: "
)
DIRECT = WITHOUT_TOOLS.format("")
TEXT_ONLY = INSTRUCTIONS.replace(SEARCHES["image_search"].instruction + " ", "")
STATIC = WITHOUT_TOOLS.format(" with the help of the information that was found")


def settings(mode: Mode, cfg: RolloutConfig, examples: str = "") -> RolloutConfig:
    """The rollout settings of a mode. examples: text that shows a prompted policy how it is done.

    A policy trained without instructions goes without here, too, except when it is prompted.
    """
    if mode in ("direct", *FIXED):
        instructions = DIRECT if mode == "direct" else STATIC
        return replace(cfg, max_turns=0, instructions=cfg.instructions and instructions)
    if mode == "text-only":
        return replace(cfg, instructions=cfg.instructions and TEXT_ONLY)
    if mode == "prompted":
        head, _, tail = INSTRUCTIONS.rpartition("Question: ")
        shown = f"Examples:\n{examples.strip()}\n" if examples else ""
        return replace(cfg, instructions=head + shown + "Question: " + tail)
    return cfg


def read_captions(path: Path | None) -> dict[str, str]:
    """{question id: caption} of JSON lines with "id" and "caption"."""
    if path is None:
        return {}
    captions = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                saved = json.loads(line)
                captions[saved["id"]] = saved["caption"]
            except (KeyError, TypeError, json.JSONDecodeError):
                raise DataError(
                    f'{path}:{number}: not of the form {{"id": …, "caption": …}}'
                ) from None
    return captions


def blind(question: Question, captions: dict) -> Question:
    """The question without its pictures."""
    caption = ""
    if question.id in captions:
        caption = f"The image shows: {captions[question.id]}\n"
    return replace(question, images=(), problem=(caption + question.problem).replace("<image>", ""))


def load_both(cfg) -> tuple[list[Question], list[Question]]:
    """A run's training and validation questions, as its mode asks them. Raises DataError."""
    files = {"images": cfg.images, "qtypes": cfg.qtypes}
    both = (
        load_questions(cfg.data, "train", cfg.limit, cfg.shuffle_seed, **files),
        load_questions(cfg.data, "validation", cfg.eval_questions, **files),
    )
    if cfg.mode == "agent":
        return both
    captions = read_captions(cfg.captions)
    return tuple([blind(question, captions) for question in questions] for questions in both)


# --------------------------------------------------------------------------- the fixed pipeline

FixedTurns = list[tuple[Turn, list[str]]]  # each turn, and the lines that it brought


def pipeline(
    kb, questions: list[Question], cfg: RolloutConfig, rerank: bool = False
) -> list[FixedTurns]:
    """For each question the turns of the fixed pipeline.

    rerank: the text search reads the pictured articles alone, as EchoSight does. (Its reranker is a
    trained Q-Former; here it is E5.)
    """
    turns = [[] for _ in questions]
    titles = [[] for _ in questions]
    # 1) look up every picture
    pictures = [
        (i, number)
        for i, question in enumerate(questions)
        for number in range(1, len(question.images) + 1)
    ]
    images = [questions[i].images[number - 1] for i, number in pictures]
    for (i, number), hits in zip(pictures, image_hits(kb, images, cfg.image_topk)):
        name = f"image {number}"
        if cfg.oracle_image:
            hits = gold_hits(questions[i], number, hits)
        turn = Turn(f"identify {name}", "image_search", name, True, hits=hits)
        turns[i].append((turn, image_lines(number, hits) or [NOTHING_FOUND]))
        titles[i] += [hit.title for hit in hits[:1]]
    # 2) one text search with the titles and the question
    queries = [
        " ".join([*names, question.problem.replace("<image>", "").strip()])
        for names, question in zip(titles, questions)
    ]
    best = reranked(kb, queries, titles, cfg.topk) if rerank else kb.text_search(queries, cfg.topk)
    for i, (query, hits) in enumerate(zip(queries, best)):
        turn = Turn(f"it is {' and '.join(titles[i])}", "text_search", query, True, hits=hits)
        turns[i].append((turn, text_lines(hits) or [NOTHING_FOUND]))
    return turns


def reranked(kb, queries: list[str], titles: list[list[str]], k: int) -> list[list[Hit]]:
    """Of each query the k best passages of the articles with these titles, by E5's scores.

    Raises ValueError where a server searches: it does not say which passages an article has.
    """
    if not isinstance(kb, KnowledgeBase):
        raise ValueError("--mode static-rerank needs the knowledge base's folder: give --kb alone")
    rows = rows_by_title(kb.texts)
    found = []
    for vector, some in zip(kb.text_encoder.encode_queries(queries), titles):
        own = [row for title in dict.fromkeys(some) for row in rows.get(title, [])]
        try:
            vectors = [kb.text_index.reconstruct(row) for row in own]
        except RuntimeError:
            raise ValueError("--mode static-rerank needs a flat index of the passages") from None
        scores = np.array(vectors).reshape(len(own), -1) @ vector if own else []
        best = sorted(zip(scores, own), key=lambda pair: -pair[0])[:k]
        found.append([passage_hit(kb.texts[row], float(score), row) for score, row in best])
    return found


@cache  # the whole corpus is read
def rows_by_title(texts: JsonLines) -> dict[str, list[int]]:
    """{title of an article: the rows of its passages}."""
    rows = defaultdict(list)
    for row in range(len(texts)):
        rows[texts[row].partition("\n")[0]].append(row)
    return dict(rows)


def opening(tokenizer, turns: FixedTurns, cfg: RolloutConfig) -> tuple[int, ...]:
    """The pipeline's turns as token ids, as an agent would have written them."""
    ids = []
    for turn, lines in turns:
        ids += trusted_ids(tokenizer, "<think>")
        ids += plain_ids(tokenizer, escape(" " + turn.thought))
        ids += trusted_ids(tokenizer, f"</think><{turn.action}>")
        ids += plain_ids(tokenizer, escape(" " + turn.argument))
        ids += trusted_ids(tokenizer, f"</{turn.action}>")
        ids += observation_ids(tokenizer, lines, cfg.max_obs_tokens)
    return tuple(ids)


# ------------------------------------------------------------------------------- a policy's answers


def run(
    mode: Mode,
    policy: Policy,
    kb,
    questions: list[Question],
    cfg: RolloutConfig,
    generator=None,
    captions: dict | None = None,
) -> list[Response]:
    """`rollout.sample` in a mode; cfg is what `settings` made of it."""
    fixed = [[] for _ in questions]
    asked = questions
    if mode == "text-only":
        asked = [blind(question, captions or {}) for question in questions]
    if mode in FIXED:
        fixed = pipeline(kb, questions, cfg, rerank=mode == "static-rerank")
        openings = [opening(policy.tokenizer, turns, cfg) for turns in fixed]
        asked = [replace(q, opening=ids) for q, ids in zip(questions, openings)]
    asked, aside = set_aside(policy.processor, asked, cfg)
    write = answered if mode in ("direct", *FIXED) else sample
    responses = put_back(write(policy, kb, asked, cfg, generator), asked, aside)
    return whole(responses, questions, fixed, cfg)


def answered(policy: Policy, kb, questions, cfg: RolloutConfig, generator) -> list[Response]:
    """One turn each, without tools: it must answer.

    A response that did not is asked for again, with its thought and the answer's tag already
    written.
    """
    tokenizer = policy.tokenizer
    responses = sample(policy, kb, questions, cfg, generator)
    silent = [i for i, response in enumerate(responses) if response.answer is None]
    if not silent:
        return responses
    again = []
    for i in silent:
        question = questions[i // cfg.group_size]
        thought = plain_ids(tokenizer, " " + escape(responses[i].turns[-1].thought))
        before, after = tokenizer(["<think>", "</think><answer>"])["input_ids"]
        ids = (*question.opening, *before, *thought, *after)
        again.append(replace(question, opening=ids))
    second = sample(policy, kb, again, replace(cfg, group_size=1), generator)
    for i, response in zip(silent, second):
        text = tokenizer.decode(response.own_ids(), skip_special_tokens=True)
        response.answer, response.stop = text.split("</")[0].strip(), "answer"
        thought = responses[i].turns[-1].thought
        response.turns = [Turn(thought, "answer", response.answer, "</answer>" in text)]
        responses[i] = response
    return responses


def whole(responses, questions, fixed: list[FixedTurns], cfg: RolloutConfig) -> list[Response]:
    """The responses with the original questions and, first, the pipeline's turns."""
    for i, response in enumerate(responses):
        number = i // cfg.group_size
        response.question = questions[number]
        response.turns = [turn for turn, _ in fixed[number]] + response.turns
    return responses


# ------------------------------------------------------------------------------ behind an endpoint


def run_endpoint(
    mode: Mode,
    endpoint: Endpoint,
    kb,
    questions: list[Question],
    cfg: RolloutConfig,
    captions: dict | None = None,
) -> list[Response]:
    """Like `run`; the responses have no tokens.

    Raises ConnectionError when the endpoint fails for good.
    """
    asked, fixed = questions, [[] for _ in questions]
    if mode == "text-only":
        asked = [blind(question, captions or {}) for question in questions]
    if mode in FIXED:
        fixed = pipeline(kb, questions, cfg, rerank=mode == "static-rerank")
    asked, aside = set_aside(None, asked, replace(cfg, max_prompt_tokens=0))
    responses, first_messages = [], {}
    for question, turns in zip(asked, fixed):
        content = first_message(question, cfg, turns)
        for _ in range(cfg.group_size):
            response = Response(question, None, None, None, None)
            responses.append(response)
            first_messages[id(response)] = content
    sampler = EndpointSampler(
        endpoint,
        cfg,
        first_message=lambda response: first_messages[id(response)],
        next_message=lambda response: information(response.observation_lines),
        stops=[f"</{name}>" for name in ACTIONS],
        cut=cut_turn,
    )
    run_episodes(sampler, kb, responses, cfg)
    return whole(put_back(responses, asked, aside), questions, fixed, cfg)


def cut_turn(text: str, stopped: bool) -> str:
    """A reply up to its first action; the tag at which a server stopped is put back.

    >>> cut_turn("<think> x</think><answer> Lima", stopped=True)
    '<think> x</think><answer> Lima</answer>'
    >>> cut_turn("<think> no <answer> yet</think><text_search> answer to it", stopped=True)[-14:]
    '</text_search>'
    """
    opened = [name for name in ACTIONS if f"<{name}>" in text]
    if stopped and opened and not tagged(text, ACTIONS):
        text += f"</{max(opened, key=lambda name: text.rfind(f'<{name}>'))}>"
    action = tagged(text, ACTIONS)
    return text[: action.end] if action else text


def first_message(question: Question, cfg: RolloutConfig, turns: FixedTurns) -> list[dict]:
    """Instructions, question with its pictures where it names them, what the pipeline found."""
    texts = message_texts(cfg.instructions or INSTRUCTIONS, question.problem)
    if turns:
        texts[-1] += "\n" + "".join(f"{information(lines)}\n" for _, lines in turns)
    content = [{"type": "text", "text": texts[0]}]
    for path, text in zip(question.images, texts[1:]):
        content += [shown(path), {"type": "text", "text": text}]
    return [part for part in content if part.get("text") != ""]  # some servers refuse empty ones


def information(lines: list[str]) -> str:
    return "<information>" + "\n".join(escape(line) for line in lines) + "</information>"


def shown(path: Path) -> dict:
    """A picture as a part of a chat message."""
    buffer = io.BytesIO()
    open_image(path).save(buffer, "JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
