"""Captions of a data set's pictures, for policies that see none (`--mode text-only`).

    python -m evaluation.caption --ckpt Qwen/Qwen2.5-VL-7B-Instruct --data data/MMhops \\
        --split test --out captions.jsonl
    python -m evaluation.caption --base-url http://localhost:8000/v1 --model NAME \\
        --out captions.jsonl

One line per question: {"id", "caption"}. A picture is described once, whatever the number of
questions about it. The same command after a kill goes on.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from config import saved_settings
from data import Question, load_questions
from engine.endpoint import Endpoint
from engine.pictures import readable
from engine.text import tagged
from evaluation.baselines import EndpointSampler, first_message, read_captions
from files.images import image_key
from files.records import FAULTS, cut_torn_line
from files.terminal import fail
from model import load_policy
from rollout import ACTIONS, Response, run_episodes, sample

PROMPT = "Say in one sentence what this image shows. Name it, if you know its name.\n"


@dataclass
class Args:
    """Write captions."""

    out: Path
    ckpt: Path | None = None  # Hugging Face name or folder
    base_url: str = ""  # or an OpenAI-compatible endpoint…
    model: str = ""  # …and its model
    data: Path = Path("data/mmhops")
    split: str = "test"
    images: Path | None = None
    limit: int | None = None
    max_tokens: int = 64  # of a caption
    batch: int = 64  # pictures at once


def main(args: Args):
    """Raises ValueError without a model, DataError on bad questions."""
    # 1) which questions have no caption yet
    questions = load_questions(args.data, args.split, args.limit, images=args.images)
    if args.out.exists():
        cut_torn_line(args.out)
    known = read_captions(args.out) if args.out.exists() else {}
    left = [q for q in questions if q.images and q.id not in known and readable(q)]
    describe = describer(args)

    # 2) their pictures, each once
    texts = {}  # {key of a picture: its caption}
    pictures = {image_key(image): image for question in left for image in question.images}
    keys = list(pictures)
    place = {key: number for number, key in enumerate(keys)}
    due = defaultdict(list)  # {key of the picture that is described last: its questions' numbers}
    for number, question in enumerate(left):
        due[max(map(image_key, question.images), key=place.get)].append(number)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a", encoding="utf-8") as file:
        for start in tqdm(range(0, len(keys), args.batch), desc="captions"):
            some = keys[start : start + args.batch]
            texts.update(zip(some, describe([pictures[key] for key in some])))
            for number in sorted(number for key in some for number in due[key]):
                own = [texts[image_key(image)] for image in left[number].images]
                line = {"id": left[number].id, "caption": joined(own)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    print(f"wrote {len(left)} captions of {len(keys)} pictures to {args.out}")


def joined(captions: list[str]) -> str:
    """
    >>> joined(["a flag"]), joined(["a flag", "a map"])
    ('a flag', 'image 1: a flag; image 2: a map')
    """
    if len(captions) == 1:
        return captions[0]
    return "; ".join(f"image {number}: {text}" for number, text in enumerate(captions, 1))


def describer(args: Args):
    """The function [picture] → [caption] of a checkpoint or an endpoint."""
    cfg, _ = saved_settings(args.ckpt)  # pictures as large as the agent sees them
    cfg = replace(cfg, group_size=1, max_turns=0, temperature=0.0, instructions=PROMPT)
    cfg.max_turn_tokens = args.max_tokens
    if args.base_url and args.model:
        endpoint = Endpoint(args.base_url, args.model)

        def written(questions: list[Question]) -> list[Response]:
            responses = [Response(question, None, None, None, None) for question in questions]
            sampler = EndpointSampler(
                endpoint,
                cfg,
                first_message=lambda response: first_message(response.question, cfg, []),
                next_message=lambda response: "",
                stops=["\n\n"],
                cut=lambda text, stopped: text,
            )
            run_episodes(sampler, None, responses, cfg)
            return responses

    elif args.ckpt:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        policy = load_policy(args.ckpt, device=device)
        policy.model.eval()

        def written(questions: list[Question]) -> list[Response]:
            return sample(policy, None, questions, cfg)

    else:
        raise ValueError("say who describes: --ckpt NAME, or --base-url URL --model NAME")

    def describe(pictures: list) -> list[str]:
        asked = [
            Question(str(i), "<image>", (picture,), "", ("",), "String", "Bridge")
            for i, picture in enumerate(pictures)
        ]
        return [caption_of(response.turn_text) for response in written(asked)]

    return describe


def caption_of(text: str) -> str:
    """A reply on one line; of one that is a turn, what it answers or asks for.

    >>> caption_of(" A flag\\n with three stripes. ")
    'A flag with three stripes.'
    >>> caption_of("<think> a flag?</think><answer> Chad</answer>")
    'Chad'
    """
    action = tagged(text, ACTIONS)
    return " ".join((action.inside if action else text).split())


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except FAULTS as error:
        fail(error)
