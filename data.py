"""Questions: what the policy is asked, and what counts as a right answer.

One dataclass, filled from any of the field's own files, as they are published:

- **ours** (`mmhops/build.py`): JSONL of MMhops records plus `images`, paths relative to the file, and, where we built the
  question ourselves, `num_steps` and `hops`, the gold chain;
- **MMhops** as released: Parquet, or the Arrow files of the `datasets` cache; pictures inside, in whichever column has
  their type. They are unpacked beside the files, once, when they are first asked for;
- **INFOSEEK**: `infoseek_*.jsonl`, with its types from `*_qtype.jsonl`, pictures `oven_*.jpg` under an image root;
- **E-VQA**: its CSV, pictures of iNaturalist and Google Landmarks under an image root. Its rows have no id; row N of
  test.csv is called "test_N" here, in predictions too.

The policy never sees the gold chain: only the warm start and the diagnostics do.
"""

import csv
import json
import os
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

PICTURES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif"}


class DataError(ValueError):
    """A question file that cannot be used; the message names the file, the line and what is wrong."""


@dataclass(frozen=True)
class Hop:
    """One step of a gold chain: the action, what it is about, the corpus rows that hold the result, and the result."""

    action: str  # image_search | text_search
    about: str  # title of the article that is read; for image_search "1" or "2", which image
    relation: str  # the relation or attribute looked up; "" for image_search
    rows: tuple[int, ...]  # rows of the text corpus, or of the image corpus for image_search
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
    split: str  # Bridge | Compare; the benchmark's own split names elsewhere
    num_steps: int | None = None  # tool calls that a perfect policy needs
    hops: tuple[Hop, ...] | None = None
    opening: tuple[
        int, ...
    ] = ()  # token ids that the policy's turn is made to begin with (evaluation/baselines.py)


# ------------------------------------------------------------------------------------------ files to records


def source_files(path: Path, split: str) -> list[Path]:
    """The files of a split: the path itself, or what a folder holds under one of the names that such files have."""
    if path.is_file():
        return [path]
    for name in (split, {"validation": "val"}.get(split, split)):
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
        f"{path} holds no {split} questions (looked for {split}.jsonl, Parquet, Arrow, infoseek_{split}.jsonl, {split}.csv)"
        if path.exists()
        else f"{path} does not exist; build the questions with: python -m mmhops.build --kb data/kb --out data/mmhops"
    )


def read_records(path: Path | str, split: str = "test", pictures: bool = False):
    """Yield (where, record) of every line or row. pictures: with `images`, a list of bytes, where the file has them inside."""
    for file in source_files(Path(path), split):
        if file.suffix == ".csv":
            with open(file, newline="", encoding="utf-8") as handle:
                for number, record in enumerate(csv.DictReader(handle)):
                    yield f"{file}:{number + 2}", {"id": f"{file.stem}_{number}"} | record
        elif file.suffix in (".parquet", ".arrow"):
            yield from read_tables(file, pictures)
        else:
            with open(file, encoding="utf-8") as handle:
                for number, line in enumerate(handle, 1):
                    try:
                        if line.strip():
                            yield f"{file}:{number}", json.loads(line)
                    except json.JSONDecodeError as error:
                        raise DataError(f"{file}:{number}: not JSON ({error})") from None


def read_tables(file: Path, pictures: bool):
    """Rows of a Parquet file, or of an Arrow file of the `datasets` cache; a few at a time, pictures may be large."""
    import pyarrow as pa
    import pyarrow.parquet

    def holds_pictures(kind) -> bool:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return holds_pictures(kind.value_type)
        return (
            pa.types.is_binary(kind)
            or pa.types.is_large_binary(kind)
            or pa.types.is_struct(kind)
            and kind.get_field_index("bytes") >= 0
        )

    try:
        source = (
            pa.parquet.ParquetFile(file)
            if file.suffix == ".parquet"
            else pa.ipc.open_stream(pa.memory_map(str(file)))
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{file} is not a readable {file.suffix[1:]} file ({error})") from None
    schema = source.schema_arrow if file.suffix == ".parquet" else source.schema
    shown = [field.name for field in schema if holds_pictures(field.type)]
    plain = [field.name for field in schema if field.name not in shown]
    columns, number = plain + shown * pictures, 0
    for batch in (
        source.iter_batches(64, columns=columns)
        if file.suffix == ".parquet"
        else (b.select(columns) for b in source)
    ):
        for record in batch.to_pylist():
            number += 1
            if pictures and shown:
                cells = [
                    cell
                    for name in shown
                    for value in [record.pop(name)]
                    for cell in (value if isinstance(value, list) else [value])
                ]
                record["images"] = [
                    cell["bytes"] if isinstance(cell, dict) else cell for cell in cells if cell
                ]
            yield f"{file}, row {number}", record


# ------------------------------------------------------------------------------------------ records to questions


class ImageFinder:
    """Pictures of a root folder by id. Looks where they usually lie; then walks the folder, once, and remembers."""

    def __init__(self, root: Path | None):
        self.root, self.index = Path(root) if root else None, None

    def __call__(self, name: str, where: str) -> Path:
        if self.root is None:
            raise DataError(
                f"{where}: the question shows image {name}; say where such images are with --images FOLDER"
            )
        landmark = (
            f"{name[:1]}/{name[1:2]}/{name[2:3]}/{name}.jpg"  # as Google Landmarks lays them out
        )
        for guess in (f"{name}.jpg", f"{name}.JPEG", f"{name}.png", landmark):
            if (self.root / guess).exists():
                return self.root / guess
        if self.index is None:
            self.index = {
                Path(file).stem: Path(folder, file)
                for folder, _, files in os.walk(self.root)
                for file in files
            }
            for table in self.root.glob(
                "*id2name.json"
            ):  # E-VQA's own tables of iNaturalist's numbers
                self.index |= {
                    number: self.root / file
                    for number, file in json.loads(table.read_text()).items()
                }
        if name not in self.index or not self.index[name].exists():
            raise DataError(f"{where}: image {name} is not under {self.root}")
        return self.index[name]


def unpack(pictures: list[bytes], name: str, folder: Path) -> list[Path]:
    """Write a question's pictures into a folder, once; safe for several processes at a time."""
    paths = []
    for i, data in enumerate(pictures):
        path = folder / f"{name}_{i}.{PICTURES.get(data[:2], 'img')}"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}")
            part.write_bytes(data)
            os.replace(part, path)
        paths.append(path)
    return paths


def parse_question(
    record: dict, folder: Path, where: str, find: ImageFinder, types: dict
) -> Question:
    """One record of any of the formats to a Question; folder: what image paths are relative to. Raises DataError, naming
    `where` and the fault."""
    try:
        if "data_id" in record:  # INFOSEEK
            accepted = record["answer_eval"]
            first = accepted[0] if isinstance(accepted, list) else accepted
            likely = "Numerical" if isinstance(first, dict) else "String"
            kind = types.get(record["data_id"], record.get("question_type", likely)).capitalize()
            if kind == "Numerical":
                accepted = first["range"][:2]
            question = Question(
                record["data_id"],
                "<image>" + record["question"],
                (find(record["image_id"], where),),
                str(record["answer"][0]),
                tuple(map(str, accepted)),
                kind,
                record["data_split"],
            )
        elif "dataset_image_ids" in record:  # E-VQA
            accepted = [
                answer.replace("&&", joint)
                for answer in record["answer"].split("|")
                for joint in ([", ", " and "] if "&&" in answer else [""])
            ]
            question = Question(
                record["id"],
                "<image>" + record["question"],
                (find(record["dataset_image_ids"].split("|")[0], where),),
                accepted[0],
                tuple(accepted),
                "String",
                record["question_type"],
                2 if record["question_type"] == "2_hop" else None,
            )
        else:  # MMhops, released or ours
            shown = record.get("images") or []
            inside = bool(shown) and isinstance(shown[0], bytes)
            images = (
                unpack(shown, record["id"], find.root or folder / "images")
                if inside
                else [folder / image for image in shown]
            )
            slots = "" if "<image>" in record["problem"] else "<image>" * len(images)
            question = Question(
                id=record["id"],
                problem=slots + record["problem"],
                images=tuple(images),
                answer=str(record["answer"]),
                answer_eval=tuple(map(str, record["answer_eval"])),
                problem_type=str(record["problem_type"]).capitalize(),
                split=record["split"],
                num_steps=record.get("num_steps"),
                hops=tuple(Hop(**(hop | {"rows": tuple(hop["rows"])})) for hop in record["hops"])
                if record.get("hops")
                else None,
            )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(
            f"{where}: not a question record ({type(error).__name__}: {error})"
        ) from None
    if question.problem.count("<image>") != len(question.images):
        raise DataError(
            f"{where}: question {question.id} has {question.problem.count('<image>')} <image> slots "
            f"for {len(question.images)} images"
        )
    if question.problem_type not in ("String", "Numerical", "Time"):
        raise DataError(
            f"{where}: question {question.id} has problem_type {question.problem_type!r}, not String, Numerical or Time"
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
    """Questions of a file, or of one split of a folder. seed shuffles, then limit cuts; without it only `limit` are read.

    images: where INFOSEEK's or E-VQA's pictures are, or where MMhops' are to be unpacked. qtypes: INFOSEEK's question types.
    Raises DataError on bad input.
    """
    path = Path(path)
    types = (
        {record["data_id"]: record["question_type"] for _, record in read_records(qtypes)}
        if qtypes
        else {}
    )
    find, folder = ImageFinder(images), path if path.is_dir() else path.parent
    questions, seen = [], {}
    for where, record in islice(
        read_records(path, split, pictures=True), limit if seed is None else None
    ):
        question = parse_question(record, folder, where, find, types)
        if question.id in seen:
            raise DataError(
                f"{where}: the id {question.id} was already used in {seen[question.id]}; ids must be unique"
            )
        seen[question.id] = where
        questions.append(question)
    if not questions:
        raise DataError(f"{path} holds no questions")
    if seed is not None:
        random.Random(seed).shuffle(questions)
    return questions[:limit]


def endless(questions: list[Question], seed: int, start: int, rank: int = 0, ranks: int = 1):
    """A rank's training questions without end, from its position `start`.

    Every epoch has a new order, a function of the seed, and is dealt to the ranks in turn.
    """
    position = start
    while True:
        epoch, place = divmod(position * ranks + rank, len(questions))
        order = list(range(len(questions)))
        random.Random(f"{seed} {epoch}").shuffle(order)
        yield questions[order[place]]
        position += 1
