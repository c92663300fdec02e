"""Ask a trained policy about your own picture, and watch it search.

python -m evaluation.chat --image flag.png --question "What is the capital of the country whose flag is shown in the image?"
python -m evaluation.chat --image flag.png --ckpt runs/other/latest        # asks for questions until an empty one
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from data import Question
from evaluate import recipe
from knowledge.client import connect
from model import load_policy
from retrieval import KnowledgeBaseError, open_image
from rollout import sample


@dataclass
class Args:
    """Ask about pictures."""

    ckpt: Path = Path("runs/tiny/latest")
    image: tuple[Path, ...] = ()
    question: str = ""  # empty: ask for one
    kb: Path = Path("data/kb")
    text_url: str = ""  # search over HTTP instead: the servers' addresses
    image_url: str = ""
    temperature: float = 0.0  # 0 is greedy
    max_turns: int | None = None


class Watched:
    """A knowledge base that tells what is searched, and found, at the moment it happens."""

    def __init__(self, kb, console):
        self.kb, self.console = kb, console

    def told(self, what: str, found: list) -> list:
        from rich.markup import escape

        for hits in found:
            self.console.print(f"[cyan]{escape(what)}[/]")
            for hit in hits:
                text = f"[dim]: {escape(hit.text[:300])}[/]" if hit.text else ""
                self.console.print(f"    [dim]{hit.score:.2f}[/]  {escape(hit.title)}{text}")
        return found

    def image_search(self, images, k):
        return (
            self.told(
                f"looks up {', '.join(Path(image).name for image in images)}",
                self.kb.image_search(images, k),
            )
            if images
            else []
        )

    def text_search(self, queries, k):
        return (
            self.told(f"searches: {', '.join(queries)}", self.kb.text_search(queries, k))
            if queries
            else []
        )


def main(args: Args):
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    for path in args.image:
        open_image(path)
    cfg, _ = recipe(args.ckpt)
    cfg = replace(
        cfg,
        group_size=1,
        temperature=args.temperature,
        max_turns=cfg.max_turns if args.max_turns is None else args.max_turns,
    )
    kb = Watched(connect(args.kb, args.text_url, args.image_url), console)
    model, processor = load_policy(args.ckpt, device="cuda" if torch.cuda.is_available() else "cpu")
    model.eval()
    while text := args.question or console.input("[bold]question:[/] ").strip():
        question = Question(
            "chat", "<image>" * len(args.image) + text, args.image, "", (), "String", "", None, None
        )
        t = sample(model, processor, kb, [question], cfg)[0]
        for turn in t.turns:
            mark = "" if turn.valid else " [red](malformed)[/]"
            console.print(
                f"  [italic]{escape(turn.thought)}[/] → {turn.action.replace('_', ' ')} {escape(turn.argument)}{mark}"
            )
        console.print(f"[bold green]{escape(t.answer)}[/]" if t.answer else "[red]no answer[/]")
        if args.question:
            break


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (KnowledgeBaseError, ValueError, OSError, EOFError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
