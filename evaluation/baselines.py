"""What the agent is compared with: the same policy, or another, used in the ways of earlier work.

| mode | tools | of the kind of |
|---|---|---|
| `agent` | as trained: it plans every turn | MMhops-R1 |
| `prompted` | the agent's prompt (the paper's, written out), an untrained policy; worked examples by `--examples` | OmniSearch |
| `direct` | none: think, then answer | the plain model |
| `static` | always: every picture is looked up, one text search with the titles and the question, then the answer | Wiki-LLaVA, EchoSight |
| `text-only` | text search alone; of the picture it knows a caption, where `--captions` has one, else nothing | Search-R1 |

A policy without tools must answer: where its only turn did not, it is asked again with `<answer>` already written. What the fixed
pipeline found stands before the policy's turn in the form in which an agent would have found it (`Question.opening`).

Any of these runs behind an OpenAI-compatible endpoint as well (`--base-url`, `--model`): there a turn is a chat message, cut at
the first closing tag, and what was found is the user's reply.
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
    "Answer the question about the image{}. First think between <think> and </think>, then give a short answer, without explanation, \
as <answer>answer</answer>.\nQuestion: "
)
DIRECT, STATIC = ASK.format(""), ASK.format(" with the help of the information that was found")
STOPS = ["</image_search>", "</text_search>", "</answer>"]


def settings(mode: Mode, cfg: RolloutConfig, examples: str = "") -> RolloutConfig:
    """The rollout settings of a mode. A policy trained without instructions goes without here, too, except when it is prompted."""
    if mode in ("direct", "static"):
        return replace(
            cfg,
            max_turns=0,
            instructions=cfg.instructions and (DIRECT if mode == "direct" else STATIC),
        )
    if mode == "prompted":
        head, _, tail = INSTRUCTIONS.rpartition("Question: ")
        return replace(
            cfg,
            instructions=head
            + (f"Examples:\n{examples.strip()}\n" if examples else "")
            + "Question: "
            + tail,
        )
    return cfg


def read_captions(path: Path | None) -> dict[str, str]:
    """{question id: caption} of JSON lines with "id" and "caption"."""
    captions = {}
    for number, line in enumerate(open(path, encoding="utf-8") if path else (), 1):
        try:
            saved = json.loads(line)
            captions[saved["id"]] = saved["caption"]
        except (KeyError, TypeError, json.JSONDecodeError):
            raise DataError(f'{path}:{number}: not of the form {{"id": …, "caption": …}}') from None
    return captions


def blind(question: Question, captions: dict) -> Question:
    """The question without its pictures."""
    caption = f"The image shows: {captions[question.id]}\n" if question.id in captions else ""
    return replace(question, images=(), problem=caption + question.problem.replace("<image>", ""))


def pipeline(
    kb, questions: list[Question], cfg: RolloutConfig
) -> list[list[tuple[Turn, list[str]]]]:
    """For each question the turns of the fixed pipeline, and the lines that each brought."""
    pictures = [
        (i, number) for i, q in enumerate(questions) for number in range(1, len(q.images) + 1)
    ]
    episodes, titles = [[] for _ in questions], [[] for _ in questions]
    for (i, number), hits in zip(
        pictures,
        kb.image_search(
            [questions[i].images[number - 1] for i, number in pictures], cfg.image_topk
        ),
    ):
        turn = Turn(f"identify image {number}", "image_search", f"image {number}", True, hits=hits)
        episodes[i].append((turn, image_lines(number, hits) or ["Nothing was found."]))
        titles[i] += [hit.title for hit in hits[:1]]
    queries = [
        " ".join([*names, q.problem.replace("<image>", "").strip()])
        for names, q in zip(titles, questions)
    ]
    for i, (query, hits) in enumerate(zip(queries, kb.text_search(queries, cfg.topk))):
        turn = Turn(f"it is {' and '.join(titles[i])}", "text_search", query, True, hits=hits)
        episodes[i].append((turn, text_lines(hits) or ["Nothing was found."]))
    return episodes


def opening(tokenizer, episode: list, cfg: RolloutConfig) -> tuple[int, ...]:
    """The pipeline's turns as token ids; what was found stays data."""
    ids = []
    for turn, lines in episode:
        for text, trusted in (
            ("<think>", True),
            (" " + turn.thought, False),
            (f"</think><{turn.action}>", True),
            (" " + turn.argument, False),
            (f"</{turn.action}>", True),
        ):
            ids += (
                tokenizer(text, add_special_tokens=False)["input_ids"]
                if trusted
                else plain_ids(tokenizer, escape(text))
            )
        ids += observation_ids(tokenizer, lines, cfg.max_obs_tokens)
    return tuple(ids)


def answered(
    model, processor, kb, questions: list[Question], cfg: RolloutConfig, generator
) -> list[Response]:
    """One turn each, without tools; whoever did not answer in it is asked again, with the answer's tag already written."""
    tokenizer = processor.tokenizer
    responses = sample(model, processor, kb, questions, cfg, generator)
    silent = [i for i, t in enumerate(responses) if t.answer is None]
    if silent:
        again = []
        for i in silent:
            question = questions[i // cfg.group_size]
            before, after = tokenizer(["<think>", "</think><answer>"])["input_ids"]
            thought = plain_ids(tokenizer, " " + escape(responses[i].turns[-1].thought))
            again.append(replace(question, opening=(*question.opening, *before, *thought, *after)))
        for i, t in zip(
            silent, sample(model, processor, kb, again, replace(cfg, group_size=1), generator)
        ):
            text = tokenizer.decode(
                t.token_ids[len(t.prompt.token_ids) :], skip_special_tokens=True
            )
            t.answer, t.stop = text.split("</")[0].strip(), "answer"
            t.turns = [
                Turn(responses[i].turns[-1].thought, "answer", t.answer, "</answer>" in text)
            ]
            responses[i] = t
    return responses


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
    asked, episodes = questions, [[] for _ in questions]
    if mode == "text-only":
        asked = [blind(q, captions or {}) for q in questions]
    if mode == "static":
        episodes = pipeline(kb, questions, cfg)
        asked = [
            replace(q, opening=opening(processor.tokenizer, episode, cfg))
            for q, episode in zip(questions, episodes)
        ]
    if mode in ("direct", "static"):
        responses = answered(model, processor, kb, asked, cfg, generator)
    else:
        responses = sample(model, processor, kb, asked, cfg, generator, go_on)
    for i, t in enumerate(responses):
        t.question = questions[i // cfg.group_size]
        t.turns = [turn for turn, _ in episodes[i // cfg.group_size]] + t.turns
    return responses


# ------------------------------------------------------------------------------------ behind an endpoint


class Endpoint:
    """A chat model that sees pictures, behind an OpenAI-compatible address. Keyword arguments go into every request."""

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
        """The next turn, cut after its first action. Servers leave out the tag at which they stopped; it is put back."""
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
        """Like `run`. The responses have no tensors. Raises openai.OpenAIError when the endpoint fails for good."""
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
