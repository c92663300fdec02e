"""Questions: what the policy is asked, and what counts as a right answer.

`load_questions` fills one dataclass from the files of several benchmarks, as they are published:

    ours      JSONL of MMhops records (mmhops/build.py), with `num_steps` and `hops`, the gold chain
    MMhops    as released: Parquet, or the Arrow files of the `datasets` cache, images inside
    INFOSEEK  infoseek_*.jsonl, its types in *_qtype.jsonl, images oven_*.jpg under a root folder
    E-VQA     its CSV, images of iNaturalist and Google Landmarks under a root folder

`load_questions(…, split)` names the file: train, validation or test. `Question.split` is another
thing: the group of questions under which a benchmark reports its results.
"""

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from files.images import ImageFinder, unpack
from files.records import DataError, check_values, read_file


@dataclass(frozen=True)
class Hop:
    """One step of a gold chain. The policy never sees it; the warm start and diagnostics do."""

    action: str  # image_search | text_search
    about: str  # title of the article that is read; for image_search which image, "1" or "2"
    relation: str  # the relation or attribute looked up; "" for image_search
    rows: tuple[int, ...]  # rows of the text corpus (image corpus for image_search) that hold it
    result: str  # the next entity's title, or the answer's text
    query: str = ""  # a query that a perfect policy could write; "" for image_search


@dataclass(frozen=True)
class Question:
    id: str
    problem: str  # text with one "<image>" per image
    images: tuple[Path, ...]
    answer: str  # what to show a person
    answer_eval: tuple[str, ...]  # aliases, or (min, max) when problem_type is Numerical
    problem_type: str  # String | Numerical | Time
    # MMhops: Bridge (a chain of hops) | Compare (two chains, then their results compared).
    # INFOSEEK: its data_split (val_unseen_question | val_unseen_entity). E-VQA: its question_type.
    split: str
    num_steps: int | None = None  # tool calls that a perfect policy needs
    hops: tuple[Hop, ...] | None = None
    passed: tuple[str, ...] = ()  # titles known to be on the way, where there are no hops
    benchmark: str = "mmhops"  # infoseek | evqa: whose rule an evaluation goes by
    reference: str = ""  # E-VQA's answer as its file has it, "oak&&fir|oak"
    # Token ids that the policy's turn is made to begin with (evaluation/baselines.py).
    opening: tuple[int, ...] = ()


# ------------------------------------------------------------------------------- files to records


def source_files(path: Path, split: str) -> list[Path]:
    """The files of a split: the path itself, or those of a folder whose names say that they are."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise DataError(
            f"{path} does not exist; the built-in questions are made with: "
            "python -m mmhops.build --kb data/kb --out data/mmhops"
        )
    for name in ("validation", "val") if split == "validation" else (split,):
        for pattern in (
            f"{name}.jsonl",
            f"**/{name}*.parquet",
            f"**/{name}/*.parquet",
            f"**/{name}/*.arrow",
            f"**/*-{name}*.arrow",
            f"infoseek_{name}.jsonl",
            f"{name}.csv",
        ):
            found = sorted(path.glob(pattern))
            if found:
                return found
    raise DataError(
        f"{path} holds no {split} questions "
        f"(looked for {split}.jsonl, Parquet, Arrow, infoseek_{split}.jsonl, {split}.csv)"
    )


def read_records(path: Path | str, split: str = "test", pictures: bool = False):
    """Yield (where, record) of every line or row of a split; `where` names it in error messages.

    pictures: where a file has images inside, give them as `images`, a list of bytes.
    """
    for file in source_files(Path(path), split):
        yield from read_file(file, pictures)


# ---------------------------------------------------------------------------- records to questions


def from_infoseek(record: dict, where: str, find: ImageFinder, types: dict) -> Question:
    """answer_eval is a list of aliases, or [{"range": [min, max], …}] of a number."""
    accepted = record["answer_eval"]
    first = accepted[0] if isinstance(accepted, list) else accepted
    likely = "Numerical" if isinstance(first, dict) else "String"
    kind = types.get(record["data_id"], record.get("question_type", likely)).capitalize()
    if kind == "Numerical":
        accepted = first["range"][:2]
    return Question(
        id=record["data_id"],
        problem="<image>" + record["question"],
        images=(find(record["image_id"], where),),
        answer=str(record["answer"][0]),
        answer_eval=tuple(map(str, accepted)),
        problem_type=kind,
        split=record["data_split"],
        num_steps=2,  # which thing is that, and what is said of it
        passed=named(record.get("entity_text")),
        benchmark="infoseek",
    )


def from_evqa(record: dict, where: str, find: ImageFinder) -> Question:
    """answer holds aliases, "Rome|Roma"; each may list several things, "oak&&fir"."""
    accepted = []
    for alias in record["answer"].split("|"):
        if "&&" in alias:
            accepted += [alias.replace("&&", ", "), alias.replace("&&", " and ")]
        else:
            accepted.append(alias)
    shown = record["dataset_image_ids"].split("|")[0]
    return Question(
        id=record["id"],
        problem="<image>" + record["question"],
        images=(find(shown, where),),
        answer=accepted[0],
        answer_eval=tuple(accepted),
        problem_type="String",
        split=record["question_type"],
        num_steps=3 if record["question_type"] == "2_hop" else 2,  # its hops, and the picture
        passed=named(record.get("wikipedia_title")),
        benchmark="evqa",
        reference=record["answer"],
    )


def named(titles: str | None) -> tuple[str, ...]:
    """E-VQA's "oak|acorn", one thing per hop; INFOSEEK's one thing, in its files with entities."""
    return tuple(title.strip() for title in (titles or "").split("|") if title.strip())


def from_mmhops(record: dict, folder: Path, find: ImageFinder) -> Question:
    """Released or ours; images are bytes, or paths relative to `folder`."""
    given = record.get("images") or []
    if given and isinstance(given[0], bytes):
        images = unpack(given, find.root or folder / "images")
    else:
        images = [folder / image for image in given]
    problem = record["problem"]
    if "<image>" not in problem:
        problem = "<image>" * len(images) + problem
    hops = None
    if record.get("hops"):
        hops = tuple(Hop(**(hop | {"rows": tuple(hop["rows"])})) for hop in record["hops"])
    return Question(
        id=record["id"],
        problem=problem,
        images=tuple(images),
        answer=str(record["answer"]),
        answer_eval=tuple(map(str, record["answer_eval"])),
        problem_type=str(record["problem_type"]).capitalize(),
        split=record["split"],
        num_steps=record.get("num_steps"),
        hops=hops,
    )


def parse_question(
    record: dict, folder: Path, where: str, find: ImageFinder, types: dict
) -> Question:
    """A record of any format to a Question. Raises DataError, naming `where` and the fault."""
    try:
        if "data_id" in record:
            question = from_infoseek(record, where, find, types)
        elif "dataset_image_ids" in record:
            question = from_evqa(record, where, find)
        else:
            question = from_mmhops(record, folder, find)
        check_values(question, record)
    except DataError:  # a picture that is not there
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{where}: not a question record ({reason})") from None

    slots = question.problem.count("<image>")
    if slots != len(question.images):
        raise DataError(
            f"{where}: question {question.id} has {slots} <image> slots "
            f"for {len(question.images)} images"
        )
    if question.problem_type not in ("String", "Numerical", "Time"):
        raise DataError(
            f"{where}: question {question.id} has problem_type {question.problem_type!r}, "
            "not String, Numerical or Time"
        )
    for image in question.images:
        if not image.exists():
            raise DataError(
                f"{where}: question {question.id} names the image {image}, which does not exist"
            )
    return question


def load_questions(
    path: Path | str,
    split: str = "test",
    limit: int | None = None,
    seed: int | None = None,
    images: Path | None = None,
    qtypes: Path | None = None,
) -> list[Question]:
    """Questions of a file, or of one split of a folder. Raises DataError on bad input.

    seed: shuffle, then take `limit`; without it only the first `limit` are read. images: where
    INFOSEEK's or E-VQA's images are, or MMhops' are to be unpacked. qtypes: INFOSEEK's types.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    find = ImageFinder(images)
    types = {}
    for where, record in read_records(qtypes) if qtypes else ():
        if not {"data_id", "question_type"} <= record.keys():
            raise DataError(f'{where}: a type needs "data_id" and "question_type"')
        types[record["data_id"]] = record["question_type"]
    records = read_records(path, split, pictures=True)
    if seed is None:
        records = islice(records, limit)
    questions = []
    seen = {}  # id → where it stands
    for where, record in records:
        question = parse_question(record, folder, where, find, types)
        if question.id in seen:
            raise DataError(
                f"{where}: the id {question.id} was already used in {seen[question.id]}; "
                "ids must be unique"
            )
        seen[question.id] = where
        questions.append(question)
    if not questions:
        raise DataError(f"{path} holds no questions")
    if seed is not None:
        random.Random(seed).shuffle(questions)
    return questions[:limit]


def gold_hop(question: Question, number: int) -> Hop | None:
    """The hop that looks up image `number`, where the question has a gold chain."""
    for hop in question.hops or ():
        if hop.action == "image_search" and hop.about == str(number):
            return hop
    return None


class Stream:
    """A rank's training questions without end, from position `drawn`. Every epoch has a new order,
    a function of the seed, dealt to the ranks in turn. Those that are not `usable` are passed over,
    and count as drawn."""

    def __init__(self, questions: list[Question], seed: int, drawn=0, rank=0, ranks=1, usable=None):
        self.questions, self.seed, self.drawn = questions, seed, drawn
        self.rank, self.ranks, self.usable = rank, ranks, usable or (lambda question: True)
        self.epoch, self.order = None, []  # shuffled once per epoch: there may be a million

    def __next__(self) -> Question:
        """Raises DataError where none of an epoch's questions is usable."""
        for _ in range(2 * len(self.questions)):  # one whole epoch at least
            epoch, place = divmod(self.drawn * self.ranks + self.rank, len(self.questions))
            if epoch != self.epoch:
                self.epoch, self.order = epoch, list(range(len(self.questions)))
                random.Random(f"{self.seed} {epoch}").shuffle(self.order)
            self.drawn += 1
            question = self.questions[self.order[place]]
            if self.usable(question):
                return question
        raise DataError(f"none of {len(self.questions)} training questions can be used")
