"""Ask a trained policy about your own picture, and watch it search.

python -m evaluation.chat --image flag.png --question "What is the capital of this country?"
python -m evaluation.chat --image flag.png      # asks for questions until an empty one
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

# before torch: spinning OpenMP threads stall shared machines
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console

from config import saved_settings
from data import Question
from engine.weights import check_name
from files.images import open_image
from files.records import FAULTS
from files.terminal import console, data, fail
from knowledge.client import connect
from model import load_policy
from retrieval import Hit
from rollout import Response, sample


@dataclass
class Args:
    """Ask about pictures."""

    # fmt: off
    ckpt: Path = Path("runs/tiny/latest")
    image: tuple[Path, ...] = ()
    question: str = ""         # empty: ask for one
    kb: Path = Path("data/kb")
    text_url: str = ""         # search over HTTP instead: the servers' addresses
    image_url: str = ""
    temperature: float = 0.0   # 0 is greedy
    max_turns: int | None = None
    # fmt: on


class Watched:
    """A knowledge base that shows what is searched, and found, at the moment it happens."""

    def __init__(self, kb, screen: Console):
        self.kb = kb
        self.screen = screen

    def image_search(self, images, k):
        if not images:
            return []
        found = self.kb.image_search(images, k)
        self.show(f"looks up {', '.join(Path(image).name for image in images)}", found)
        return found

    def text_search(self, queries, k):
        if not queries:
            return []
        found = self.kb.text_search(queries, k)
        self.show(f"searches: {', '.join(queries)}", found)
        return found

    def show(self, search: str, found: list[list[Hit]]):
        for hits in found:
            self.screen.print(f"[cyan]{data(search)}[/]")
            for hit in hits:
                text = f"[dim]: {data(hit.text[:300])}[/]" if hit.text else ""
                self.screen.print(f"    [dim]{hit.score:.2f}[/]  {data(hit.title)}{text}")


def main(args: Args):
    screen = console()
    # 1) the pictures, the knowledge base, the policy
    for path in args.image:
        open_image(path)  # refuse what is no picture before anything is loaded
    check_name(args.ckpt)
    cfg, _ = saved_settings(args.ckpt)
    cfg = replace(cfg, group_size=1, temperature=args.temperature)
    if args.max_turns is not None:
        cfg = replace(cfg, max_turns=args.max_turns)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kb = Watched(connect(args.kb, args.text_url, args.image_url, device), screen)
    policy = load_policy(args.ckpt, device=device)
    policy.model.eval()

    # 2) one question, or as many as are typed
    while text := args.question or screen.input("[bold]question:[/] ").strip():
        question = as_question(text, args.image)
        (response,) = sample(policy, kb, [question], cfg)
        show(response, screen)
        if args.question:
            break


def as_question(text: str, images: tuple[Path, ...]) -> Question:
    """A question whose answer is not known."""
    return Question(
        id="chat",
        problem="<image>" * len(images) + text.replace("<image>", ""),
        images=images,
        answer="",
        answer_eval=(),
        problem_type="String",
        split="",
        num_steps=None,
        hops=None,
    )


def show(response: Response, screen: Console):
    for turn in response.turns:
        mark = "" if turn.valid else " [red](malformed)[/]"
        action = turn.action.replace("_", " ")
        screen.print(f"  [italic]{data(turn.thought)}[/] → {action} {data(turn.argument)}{mark}")
    answer = f"[bold green]{data(response.answer)}[/]" if response.answer else "[red]no answer[/]"
    screen.print(answer)


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (EOFError, *FAULTS) as error:
        fail(error)
