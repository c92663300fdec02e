"""Hostile texts, files and answers by the thousand: is each refused in a sentence, or just data?

    python -m benchmarks.fuzz                          # 100,000 cases, some minutes
    python -m benchmarks.fuzz --cases 1000 --seed 7    # what the tests run
    python -m benchmarks.fuzz --only turns --seed 7 --first 4242 --cases 1      # one case again

A case is a function of (seed, its class, its number). A fault ends the run with these three.
"""

import contextlib
import csv
import io
import json
import random
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow
from pyarrow import parquet
from transformers import AutoTokenizer

from benchmarks.qwen_tokenizer import qwen
from data import DataError, load_questions
from engine import checkpoint
from engine.text import observation_ids, plain_ids, trusted_ids, turn_end
from evaluation.show import print_response
from files.images import image_bytes, open_image
from files.records import (
    MISREAD,
    KnowledgeBaseError,
    checksum,
    read_file,
    refuse_code,
    whole_characters,
)
from files.rows import JsonLines
from files.terminal import OBEYED, console, data, visible
from knowledge.client import image_hit, read_hits, text_hit
from mmhops.expand import Rejected, parse_object
from retrieval import Hit, read_manifest
from rollout import ACTIONS, CLOSING, Response, Turn, parse_turn

WARMSTART = Path("assets/tiny-warmstart")
PIECES = (
    *(f"<{slash}{name}>" for name in (*ACTIONS, "think", "information") for slash in ("", "/")),
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|image_pad|>",
    "<|vision_start|>",
    "<|endoftext|>",
    "<image>",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "\r",
    "\x00",
    "\u202e",
    "\ufeff",
    "\ud800",
    "[/bold][link=x]",
    ":dog:",
    "\\",
    "<",
    "</",
    "‹",
    "{",
    '"',
    "}" * 3,
    "9" * 40,
    "é\u0301",
    "𝔘",
    "中文",
    "image 1",
    " capital of Chad ",
    "\n",
    "a",
)
VALUES = (
    None,
    True,
    -1,
    1e400,
    float("nan"),
    10**30,
    "",
    "x",
    [],
    {},
    [[]],
    {"a": [None]},
    "\ud800",
)


@dataclass
class Args:
    """Try to break what reads."""

    cases: int = 100_000  # over all classes
    seed: int = 0
    first: int = 0  # number of the first case of each class
    only: str = ""  # one class
    tokenizers: tuple[Path, ...] = (WARMSTART,)  # another one: a folder of a checkpoint
    qwen: bool = True  # the tokenizer of the released models, too


def hostile(rng: random.Random, most: int = 30) -> str:
    """A text of pieces that mean something to somebody."""
    return "".join(rng.choices(PIECES, k=rng.randint(0, most)))


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The same with bytes changed, cut out, put in, or its end cut off."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(changed) + 1)
        what = rng.randrange(4)
        if what == 0:
            changed[place : place + 1] = rng.randbytes(1)
        elif what == 1:
            del changed[place : place + rng.randint(1, 20)]
        elif what == 2:
            changed[place:place] = rng.choice(PIECES).encode("utf-8", "replace")
        elif len(changed) > 1:
            del changed[max(1, place) :]
    return bytes(changed)


def twisted(rng: random.Random, value):
    """A JSON value of which one part is something else."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {name: part for name, part in value.items() if name != key}
        return value | {key: twisted(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], twisted(rng, value[place]), *value[place + 1 :]]
    return rng.choice((*VALUES, hostile(rng, 5)))


# ------------------------------------------------------------- a class of cases each: rng → nothing


def observations(tokenizers: list, rng: random.Random):
    """What was retrieved forges no tag and no special token, and keeps to its budget."""
    for tokenizer in tokenizers:
        lines = [hostile(rng) for _ in range(rng.randint(1, 3))]
        ids = observation_ids(tokenizer, lines, 84)
        head = trusted_ids(tokenizer, "\n<information>")
        tail = trusted_ids(tokenizer, "</information>\n")
        assert len(ids) <= 84
        assert ids[: len(head)] == head and ids[-len(tail) :] == tail
        inside = ids[len(head) : -len(tail)]
        assert not set(inside) & set(tokenizer.all_special_ids)
        text = tokenizer.decode(inside)
        assert not re.search(rf"</?({'|'.join(ACTIONS)}|think|information)>|<\|", text), text


def turns(tokenizers: list, rng: random.Random):
    """A turn is what an independent specification says, and ends at its first closing tag."""
    text = hostile(rng, 12)
    if rng.random() < 0.5:
        text = f"<think>{hostile(rng, 2)}</think><{(name := rng.choice(ACTIONS))}> x</{name}>" + (
            hostile(rng, 1)
        )
    turn = parse_turn(text)
    names = "|".join(ACTIONS)
    first = re.search(rf"<({names})>(.*?)</\1>", text, re.DOTALL)
    if not turn.valid:
        assert turn.action == (first[1] if first else "invalid")
        assert turn.argument == (first[2].strip() if first else "")
    else:
        assert text.count("<think>") == text.count("</think>") == 1 and "<" not in turn.argument
        rest = text.strip().removeprefix("<think>").partition("</think>")[2].strip()
        assert re.fullmatch(rf"<({names})>[^<]*</\1>", rest), text
    for tokenizer in tokenizers:  # spelled as badly as it can be: a token per character
        ids = [token for letter in whole_characters(text) for token in plain_ids(tokenizer, letter)]
        ends = turn_end(tokenizer, CLOSING)
        read = next((n for n in range(1, len(ids) + 1) if ends(ids[:n])), None)
        closing = re.search("|".join(CLOSING), tokenizer.decode(ids))
        assert (read is None) == (closing is None), text
        if read is not None:
            assert tokenizer.decode(ids[:read]).endswith(closing.group())


def terminal(question, rng: random.Random):
    """Nothing that a terminal obeys is printed, and markup of others stays text."""
    said = [hostile(rng, 8) for _ in range(5)]
    hits = [Hit(said[3], said[4], 0.5, 0)]
    turn = Turn(said[0], "text_search", said[1], False, "", hits)
    response = Response(question, None, None, None, None, [turn], said[2], "answer")
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        print_response(response)
    printed = shown.getvalue()
    assert not OBEYED.search(printed), printed
    with contextlib.redirect_stdout(io.StringIO()) as wide:
        console(width=10_000).print(data(said[0]))
    plain = "".join(visible(said[0]).split())
    assert "".join(wide.getvalue().split()).rstrip("\\") == plain.rstrip("\\")


def questions(folder: Path, rng: random.Random):
    """A file of questions is read, or refused in one sentence that names it."""
    whole = (folder / "whole.jsonl").read_bytes().splitlines(keepends=True)
    if rng.random() < 0.5:
        lines = [json.dumps(twisted(rng, json.loads(line))).encode() + b"\n" for line in whole]
        content = b"".join(lines)
    else:
        content = damaged(rng, b"".join(whole))
    refused(DataError, folder / "broken.jsonl", content, load_questions)


def tables(folder: Path, rng: random.Random):
    """The same of E-VQA's CSV."""
    content = damaged(rng, (folder / "whole.csv").read_bytes())
    load = partial(load_questions, images=folder / "images")
    refused(DataError, folder / "broken.csv", content, load)


def columns(folder: Path, rng: random.Random):
    """The same of Parquet and Arrow files, read to their end."""
    kind = rng.choice(("parquet", "arrow"))
    content = damaged(rng, (folder / f"whole.{kind}").read_bytes())
    read = rng.choice((read_all, load_questions))
    refused(DataError, folder / f"broken.{kind}", content, read)


def read_all(path: Path):
    for _ in read_file(path, images=True):
        pass


def manifests(folder: Path, rng: random.Random):
    """A knowledge base's manifest has what is read of it, or is refused."""
    encoder = {"kind": "e5", "name": "x", "nprobe": 3}
    whole = {
        "files": {"a": {"bytes": 3, "sha256": "0"}},
        "encoders": {"text": encoder, "image": encoder},
    }
    text = json.dumps(twisted(rng, whole)).encode()
    content = text if rng.random() < 0.5 else damaged(rng, text)
    refused(
        KnowledgeBaseError, folder / "manifest.json", content, lambda path: read_manifest(folder)
    )


def corpora(folder: Path, rng: random.Random):
    """A corpus's rows are texts in their places, or refused when they are read."""
    rows = [twisted(rng, {"id": number, "contents": "Chad\nA country"}) for number in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    content = text if rng.random() < 0.5 else damaged(rng, text)

    def load(path: Path):
        for row in JsonLines(path, "contents"):
            assert isinstance(row, str)
            row.encode()

    refused(KnowledgeBaseError, folder / "broken_corpus.jsonl", content, load)


def checkpoints(folder: Path, rng: random.Random):
    """A checkpoint is whole, or refused."""
    inside = folder / "checkpoint"
    inside.mkdir(exist_ok=True)
    (inside / "weights").write_bytes(b"123")
    sums = {"weights": [3, checksum(inside / "weights")]}
    for name, whole in (("trainer", {"step": 1, "ranks": 1}), ("checksums", sums)):
        value = json.dumps(twisted(rng, whole) if rng.random() < 0.5 else whole).encode()
        (inside / f"{name}.json").write_bytes(damaged(rng, value) if rng.random() < 0.3 else value)
    with contextlib.suppress(ValueError):
        assert isinstance(checkpoint.verify(inside)["step"], int)


def refused(kind: type, path: Path, content: bytes, load):
    path.write_bytes(content)
    try:
        load(path)
    except kind as error:
        assert str(path) in str(error), error


def pictures(folder: Path, rng: random.Random):
    """A damaged picture is shown, or refused."""
    kind = rng.choice(("png", "jpg", "gif", "webp", "bmp"))
    path = folder / f"broken.{kind}"
    path.write_bytes(damaged(rng, (folder / f"whole.{kind}").read_bytes()))
    with contextlib.suppress(ValueError, OSError):
        image_bytes(open_image(path))


def models(folder: Path, rng: random.Random):
    """A model's settings name no code, are refused, or are no JSON."""
    inside = folder / "model"
    inside.mkdir(exist_ok=True)
    value = twisted(rng, {"a": [{"b": {"trust_remote_code": rng.choice((True, False))}}], "c": 1})
    text = json.dumps(value).encode()
    (inside / "config.json").write_bytes(text if rng.random() < 0.5 else damaged(rng, text))
    with contextlib.suppress(DataError):
        refuse_code(inside)
        assert '"trust_remote_code": true' not in (inside / "config.json").read_text()


def answers(rng: random.Random):
    """A retrieval server's answer is hits with scores, or bad."""
    text = [{"document": {"id": "3", "contents": "Chad\nIts capital"}, "score": 0.5}]
    image = [{"id": "4", "title": "Chad", "score": 0.5}]
    for good, read in ((text, text_hit), (image, image_hit)):
        with contextlib.suppress(*MISREAD):
            for hits in read_hits(twisted(rng, [good, good]), 2, 1, read):
                assert len(hits) <= 1
                for hit in hits:
                    assert isinstance(hit.title, str) and hit.score == hit.score


def replies(rng: random.Random):
    """A language model's reply is a flat object of texts, or rejected."""
    text = json.dumps(twisted(rng, {"question": "How old?", "answer": 12, "good": "yes"}))
    text = hostile(rng, 3) + rng.choice((text, "[" * 5000, '{"a": ' + "9" * 5000 + "}"))
    with contextlib.suppress(Rejected):
        found = parse_object(text)
        assert all(isinstance(value, str) for value in found.values())
        json.dumps(found, ensure_ascii=False).encode()


# --------------------------------------------------------------------------------------- all of it


def prepare(folder: Path):
    """Small files of each kind, whole."""
    from PIL import Image

    (folder / "images").mkdir()
    picture = Image.radial_gradient("L").convert("RGB").resize((24, 24))
    for kind in ("png", "jpg", "gif", "webp", "bmp"):
        picture.save(folder / f"whole.{kind}")
    shutil.copy(folder / "whole.png", folder / "images" / "1.png")
    hop = {"action": "image_search", "about": "1", "relation": "", "rows": [0], "result": "Chad"}
    with open(folder / "whole.jsonl", "w") as file:
        for number in range(3):
            record = {
                "id": f"q{number}",
                "problem": "What is the capital of <image>?",
                "images": ["images/1.png"],
                "answer": "N'Djamena",
                "answer_eval": ["N'Djamena"],
                "problem_type": "string",
                "split": "Bridge",
                "num_steps": 2,
                "hops": [hop],
            }
            file.write(json.dumps(record) + "\n")
    table = pyarrow.Table.from_pylist(
        [
            {"id": f"q{i}", "problem": "What?", "answer": "Chad", "image": b"\x89PNG"}
            for i in range(200)
        ]
    )
    parquet.write_table(table, folder / "whole.parquet")
    with pyarrow.ipc.new_stream(folder / "whole.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=50)
    with open(folder / "whole.csv", "w", newline="") as file:
        names = ("question", "answer", "dataset_image_ids", "question_type", "wikipedia_title")
        rows = csv.writer(file)
        rows.writerow(names)
        rows.writerows([("What is it?", "oak|tree&&bush", "1|2", "automatic", "Oak")] * 3)


def classes(args: Args, folder: Path) -> dict:
    """{name: (function of rng, how large its share of the cases is)}."""
    prepare(folder)
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in args.tokenizers]
    tokenizers += [qwen()] if args.qwen else []
    (question, *_) = load_questions(folder / "whole.jsonl")
    return {
        "observations": (partial(observations, tokenizers), 0.33),
        "turns": (partial(turns, tokenizers), 0.23),
        "terminal": (partial(terminal, question), 0.05),
        "questions": (partial(questions, folder), 0.07),
        "tables": (partial(tables, folder), 0.05),
        "columns": (partial(columns, folder), 0.04),
        "pictures": (partial(pictures, folder), 0.05),
        "models": (partial(models, folder), 0.04),
        "manifests": (partial(manifests, folder), 0.03),
        "corpora": (partial(corpora, folder), 0.03),
        "checkpoints": (partial(checkpoints, folder), 0.02),
        "answers": (answers, 0.03),
        "replies": (replies, 0.03),
    }


def main(args: Args) -> dict[str, int]:
    """{class: cases}. Raises AssertionError at the first fault, naming the case."""
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (try_one, share) in classes(args, Path(folder)).items():
            if args.only not in ("", name):
                continue
            started = time.monotonic()
            counts[name] = args.cases if args.only else round(args.cases * share)
            for number in range(args.first, args.first + counts[name]):
                rng = random.Random(f"{args.seed} {name} {number}")
                try:
                    try_one(rng)
                except Exception as error:
                    case = f"--only {name} --seed {args.seed} --first {number} --cases 1"
                    raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
            taken = time.monotonic() - started
            print(
                f"{name:13s}{counts[name]:7,d} cases {taken:6.1f} s, seed {args.seed}", flush=True
            )
    print(f"{sum(counts.values()):20,d} cases, no fault")
    return counts


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
