"""What the agent is compared with: the same policy, or another, used in the ways of earlier work.

    agent       as trained: it plans every turn                              MMhops-R1
    prompted    an untrained policy, the task written out in its prompt      OmniSearch
    direct      no tools: think, then answer                                 the plain model
    static      always: look up every picture, search text once, answer      Wiki-LLaVA, EchoSight
    text-only   text search alone; of a picture at most a caption            Search-R1

Any of these runs behind an OpenAI-compatible endpoint as well (`--base-url`, `--model`): there a
turn is a chat message, cut at the first closing tag, and what was found is the user's reply.
"""

import base64
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

from data import DataError, Question
from retrieval import open_image
from rollout import (
    ACTION,
    INSTRUCTIONS,
    Response,
    RolloutConfig,
    Row,
    Turn,
    act,
    escape,
    image_lines,
    observation_ids,
    plain_ids,
    sample,
    text_lines,
)

Mode = Literal["agent", "prompted", "direct", "static", "text-only"]
ASK = (
    "Answer the question about the image{}. First think between <think> and </think>, then give a "
    "short answer, without explanation, as <answer>answer</answer>.\nQuestion: "
)
DIRECT = ASK.format("")
STATIC = ASK.format(" with the help of the information that was found")
STOPS = ["</image_search>", "</text_search>", "</answer>"]
Found = tuple[Turn, list[str]]  # a turn of the fixed pipeline, and the lines that it brought


def settings(mode: Mode, cfg: RolloutConfig, examples: str = "") -> RolloutConfig:
    """The rollout's settings in a mode. examples: text that shows a prompted policy how it is done.

    A policy trained without instructions goes without here, too, except when it is prompted.
    """
    if mode in ("direct", "static"):
        wording = DIRECT if mode == "direct" else STATIC
        return replace(cfg, max_turns=0, instructions=wording if cfg.instructions else "")
    if mode == "prompted":
        head, _, tail = INSTRUCTIONS.rpartition("Question: ")
        shown = f"Examples:\n{examples.strip()}\n" if examples else ""
        return replace(cfg, instructions=f"{head}{shown}Question: {tail}")
    return cfg


def read_captions(path: Path | None) -> dict[str, str]:
    """{question id: caption} of JSON lines with "id" and "caption"; none without a file."""
    captions = {}
    if path is None:
        return captions
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                saved = json.loads(line)
                captions[saved["id"]] = saved["caption"]
            except (KeyError, TypeError, json.JSONDecodeError):
                raise DataError(
                    f'{path}:{number}: not of the form {{"id": …, "caption": …}}'
                ) from None
    return captions


def without_images(question: Question) -> str:
    return question.problem.replace("<image>", "")


def blind(question: Question, captions: dict[str, str]) -> Question:
    """The question without its pictures, with a caption where there is one."""
    caption = f"The image shows: {captions[question.id]}\n" if question.id in captions else ""
    return replace(question, images=(), problem=caption + without_images(question))


# -------------------------------------------------------------------------- the fixed pipeline


def pipeline(kb, questions: list[Question], cfg: RolloutConfig) -> list[list[Found]]:
    """For each question the turns of the fixed pipeline, and the lines that each brought."""
    turns = [[] for _ in questions]
    titles = [[] for _ in questions]  # of the nearest articles, per picture

    # 1) every picture is looked up
    numbered = [
        (i, number, picture)
        for i, question in enumerate(questions)
        for number, picture in enumerate(question.images, 1)
    ]
    found = kb.image_search([picture for *_, picture in numbered], cfg.image_topk)
    for (i, number, _), hits in zip(numbered, found):
        turn = Turn(f"identify image {number}", "image_search", f"image {number}", True, hits=hits)
        turns[i].append((turn, image_lines(number, hits) or ["Nothing was found."]))
        titles[i] += [hit.title for hit in hits[:1]]

    # 2) one text search, with the titles and the question
    queries = [
        " ".join([*names, without_images(question).strip()])
        for names, question in zip(titles, questions)
    ]
    found = kb.text_search(queries, cfg.topk)
    for i, (query, hits) in enumerate(zip(queries, found)):
        turn = Turn(f"it is {' and '.join(titles[i])}", "text_search", query, True, hits=hits)
        turns[i].append((turn, text_lines(hits) or ["Nothing was found."]))
    return turns


def opening(tokenizer, found: list[Found], cfg: RolloutConfig) -> tuple[int, ...]:
    """The pipeline's turns as token ids (`Question.opening`), in the form an agent's would have."""

    def tag_ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def data_ids(text: str) -> list[int]:  # what was found stays data: it cannot forge a tag
        return plain_ids(tokenizer, " " + escape(text))

    ids = []
    for turn, lines in found:
        ids += tag_ids("<think>")
        ids += data_ids(turn.thought)
        ids += tag_ids(f"</think><{turn.action}>")
        ids += data_ids(turn.argument)
        ids += tag_ids(f"</{turn.action}>")
        ids += observation_ids(tokenizer, lines, cfg.max_obs_tokens)
    return tuple(ids)


# ------------------------------------------------------------------------------------ a policy


def run(
    mode: Mode,
    model,
    processor,
    kb,
    questions: list[Question],
    cfg: RolloutConfig,
    generator=None,
    captions: dict | None = None,
    go_on=bool,
) -> list[Response]:
    """`rollout.sample` in a mode; cfg is what `settings` made of it."""
    # 1) the questions as this mode puts them
    asked = questions
    found = [[] for _ in questions]
    if mode == "text-only":
        asked = [blind(question, captions or {}) for question in questions]
    if mode == "static":
        found = pipeline(kb, questions, cfg)
        asked = [
            replace(question, opening=opening(processor.tokenizer, brought, cfg))
            for question, brought in zip(questions, found)
        ]
    # 2) ask
    if mode in ("direct", "static"):
        responses = answered(model, processor, kb, asked, cfg, generator)
    else:
        responses = sample(model, processor, kb, asked, cfg, generator, go_on)
    # 3) the responses are to the questions as they are, and the pipeline's turns count as theirs
    for i, response in enumerate(responses):
        response.question = questions[i // cfg.group_size]
        response.turns = [turn for turn, _ in found[i // cfg.group_size]] + response.turns
    return responses


def answered(
    model, processor, kb, questions: list[Question], cfg: RolloutConfig, generator
) -> list[Response]:
    """One turn each, without tools: it must answer.

    Where it did not, the policy is asked again, with its thought and `<answer>` already written.
    """
    tokenizer = processor.tokenizer
    responses = sample(model, processor, kb, questions, cfg, generator)
    silent = [i for i, response in enumerate(responses) if response.answer is None]
    if not silent:
        return responses
    thoughts = [responses[i].turns[-1].thought for i in silent]
    before, after = tokenizer(["<think>", "</think><answer>"])["input_ids"]
    again = []
    for i, thought in zip(silent, thoughts):
        question = questions[i // cfg.group_size]
        ids = plain_ids(tokenizer, " " + escape(thought))
        again.append(replace(question, opening=(*question.opening, *before, *ids, *after)))
    second = sample(model, processor, kb, again, replace(cfg, group_size=1), generator)
    for i, thought, response in zip(silent, thoughts, second):
        start = len(response.prompt.token_ids)
        text = tokenizer.decode(response.token_ids[start:], skip_special_tokens=True)
        response.answer = text.split("</")[0].strip()
        response.stop = "answer"
        response.turns = [Turn(thought, "answer", response.answer, "</answer>" in text)]
        responses[i] = response
    return responses


# -------------------------------------------------------------------------- behind an endpoint


class Endpoint:
    """A chat model that sees pictures, behind an OpenAI-compatible address."""

    def __init__(self, base_url: str, model: str, workers: int = 16, retries: int = 5):
        from openai import OpenAI

        self.client = OpenAI(
            base_url=base_url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            max_retries=retries,
            timeout=300,
        )
        self.model, self.workers = model, workers

    def reply(self, messages: list, cfg: RolloutConfig) -> str:
        """The next turn, cut after its first action.

        Servers leave out the tag at which they stopped; it is put back.
        """
        done = self.client.chat.completions.create(
            model=self.model,
            messages=messages,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            max_tokens=cfg.max_turn_tokens,
            stop=STOPS,
        )
        text = done.choices[0].message.content or ""
        opened = [tag for tag in ("image_search", "text_search", "answer") if f"<{tag}>" in text]
        if not ACTION.search(text) and opened and done.choices[0].finish_reason == "stop":
            text += f"</{max(opened, key=text.rfind)}>"
        action = ACTION.search(text)
        return text[: action.end()] if action else text

    def sample(
        self,
        mode: Mode,
        kb,
        questions: list[Question],
        cfg: RolloutConfig,
        captions: dict | None = None,
    ) -> list[Response]:
        """Like `run`; the responses have no tensors.

        Raises openai.OpenAIError when the endpoint fails for good.
        """
        asked = [blind(q, captions or {}) for q in questions] if mode == "text-only" else questions
        episodes = pipeline(kb, questions, cfg) if mode == "static" else [[] for _ in questions]
        rows = [Row(q, None) for q in asked for _ in range(cfg.group_size)]
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        *map(shown, q.images),
                        {"type": "text", "text": self.wording(q, cfg, episode)},
                    ],
                }
            ]
            for q, episode in zip(asked, episodes)
            for _ in range(cfg.group_size)
        ]
        with ThreadPoolExecutor(self.workers) as pool:
            for turn in range(cfg.max_turns + 1):
                live = [i for i, row in enumerate(rows) if not row.stop]
                for i, text in zip(live, pool.map(lambda i: self.reply(chats[i], cfg), live)):
                    rows[i].text = text
                act([rows[i] for i in live], kb, cfg, last_turn=turn == cfg.max_turns)
                for i in (i for i in live if not rows[i].stop):
                    chats[i] = chats[i] + [
                        {"role": "assistant", "content": rows[i].text},
                        {"role": "user", "content": information(rows[i].lines)},
                    ]
        opened = [[turn for turn, _ in episode] for episode in episodes]
        return [
            Response(
                questions[i // cfg.group_size],
                None,
                None,
                None,
                None,
                opened[i // cfg.group_size] + row.turns,
                row.answer,
                row.stop,
            )
            for i, row in enumerate(rows)
        ]

    def wording(self, question: Question, cfg: RolloutConfig, episode: list) -> str:
        found = "".join(f"{information(lines)}\n" for _, lines in episode)
        return (
            (cfg.instructions or INSTRUCTIONS)
            + escape(question.problem.replace("<image>", ""))
            + ("\n" + found if found else "")
        )


def information(lines: list[str]) -> str:
    return "<information>" + "\n".join(escape(line) for line in lines) + "</information>"


def shown(path: Path) -> dict:
    """A picture as a chat message's part."""
    buffer = io.BytesIO()
    open_image(path).save(buffer, "JPEG", quality=90)
    return {
        "type": "image_url",
        "image_url": {
            "url": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        },
    }
