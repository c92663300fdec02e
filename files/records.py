"""Records out of files: lines of JSON, rows of CSV, Parquet and Arrow; each with its place."""

import csv
import gzip
import hashlib
import json
import math
import zlib
from pathlib import Path


class DataError(ValueError):
    """A file that cannot be used; the message names the file, the line and what is wrong."""


# What pyarrow raises where a file is damaged; SystemError is its fault, for a size below zero.
BROKEN_TABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, MemoryError, SystemError)


# What taking a JSON value apart raises where it is not the one that was expected.
MISREAD = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class KnowledgeBaseError(RuntimeError):
    """A knowledge base that cannot be used; the message says which file, why, and what to do."""


# Wrong input, a file or a server that cannot be used: a program ends with one sentence.
FAULTS = (ValueError, OSError, KnowledgeBaseError, FloatingPointError)


def read_file(file: Path, images: bool = False):
    """Yield (where, record) of every line or row; `where` names it in error messages.

    images: where the file has images inside, give them as `images`, a list of bytes.
    """
    if file.suffix == ".csv":
        yield from read_csv(file)
    elif file.suffix in (".parquet", ".arrow"):
        yield from read_table(file, images)
    else:
        for number, record in read_jsonl(file):
            yield f"{file}:{number}", record


def read_jsonl(file: Path):
    """Yield (number of the line, record); the file may be gzipped, empty lines do not count."""
    opened = gzip.open if file.suffix == ".gz" else open
    for number, line in text_lines(file, opened):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}:{number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise DataError(f"{file}:{number}: not a record, but {str(record)[:40]!r}")
        yield number, without_halves(record) if "\\u" in line else record


def cut_torn_line(file: Path):
    """Cut off a last line without an end: a process was killed while it wrote."""
    with open(file, "rb+") as opened:
        opened.truncate(opened.read().rfind(b"\n") + 1)


def text_lines(file: Path, opened=open, **how):
    """Yield (number, line) of a text in UTF-8, with or without a byte order mark."""
    number = 0
    try:
        with opened(file, "rt", encoding="utf-8-sig", **how) as lines:
            for number, line in enumerate(lines, 1):
                yield number, line
    except UnicodeDecodeError as error:
        raise DataError(f"{file}:{number + 1}: not UTF-8 ({error}); save it as UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: broken after line {number} ({error})") from None


def without_halves(value):
    r"""A JSON value whose text can be written: lone surrogates ("\ud800") become "?"."""
    return json.loads(whole_characters(json.dumps(value, ensure_ascii=False)))


def whole_characters(text: str) -> str:
    r"""A text that can be written and tokenised: half a character ("\ud800") becomes "?"."""
    return text.encode("utf-8", "replace").decode()


def read_csv(file: Path):
    """Rows of a CSV that has no ids (E-VQA's): row N of test.csv is called test_N."""
    rows = csv.DictReader(line for _, line in text_lines(file, newline=""))
    try:
        for number, record in enumerate(rows):
            if None in record or None in record.values():
                raise DataError(
                    f"{file}:{number + 2}: not as many cells as the {len(rows.fieldnames)} columns "
                    f"({', '.join(rows.fieldnames)}); are they divided by commas?"
                )
            yield f"{file}:{number + 2}", {"id": f"{file.stem}_{number}"} | record
    except csv.Error as error:
        raise DataError(f"{file}:{rows.line_num}: not CSV ({error})") from None


def read_table(file: Path, images: bool):
    """Rows of a Parquet file, or of an Arrow file of the `datasets` cache."""
    import pyarrow as pa
    import pyarrow.parquet

    # 1) Open it.
    try:
        if file.suffix == ".parquet":
            source = pa.parquet.ParquetFile(file)
            schema = source.schema_arrow
        else:
            source = pa.ipc.open_stream(pa.OSFile(str(file)))
            schema = source.schema
    except BROKEN_TABLE as error:
        raise DataError(f"{file} is not a readable {file.suffix[1:]} file ({error})") from None

    # 2) Which columns hold images? Their type says so, whatever they are called.
    image_columns = [field.name for field in schema if holds_images(field.type)]
    columns = [field.name for field in schema if field.name not in image_columns]
    if images:
        columns += image_columns

    # 3) Read a few rows at a time: images may be large.
    if file.suffix == ".parquet":
        batches = iter(source.iter_batches(64, columns=columns))
    else:
        batches = (batch.select(columns) for batch in source)
    number = 0
    while True:
        try:
            batch = next(batches, None)
            if batch is not None:
                batch.validate(full=True)  # else a damaged one is read beyond its end
            records = [] if batch is None else batch.to_pylist()
        except BROKEN_TABLE as error:
            raise DataError(f"{file}: broken after row {number} ({error})") from None
        if batch is None:
            return
        for record in records:
            number += 1
            if images and image_columns:
                cells = [record.pop(name) for name in image_columns]
                record["images"] = list(images_in(cells))
            yield f"{file}, row {number}", record


def holds_images(kind) -> bool:
    """Is an Arrow type bytes, a struct with `bytes` (as `datasets` has it), or a list of these?"""
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return holds_images(kind.value_type)
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def images_in(cells: list):
    """The bytes of every image in a row's cells; a cell is bytes, {"bytes": …}, None, or a list.

    >>> list(images_in([b"a", None, [{"bytes": b"b", "path": "b.png"}, b"c"]]))
    [b'a', b'b', b'c']
    """
    for cell in cells:
        if isinstance(cell, list):
            yield from images_in(cell)
        elif isinstance(cell, dict):
            yield cell["bytes"]
        elif cell:
            yield cell


def refuse_code(folder: Path | str):
    """Raises DataError where a JSON file of a model's folder, if it is one, names code to be run.

    The libraries that read such files run what `auto_map` and `trust_remote_code` name, some of
    them without being asked to.
    """
    for file in sorted(Path(folder).rglob("*.json")):
        try:
            found = code_in(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} is not readable JSON ({error})") from None
        if found:
            raise DataError(f"{file} names code to be run ({found}): nothing here runs it")


def code_in(value) -> str:
    """The first key inside a JSON value that names code, or "".

    >>> code_in({"a": [{"tokenizer_kwargs": {"trust_remote_code": True}}]})
    'trust_remote_code'
    >>> code_in({"trust_remote_code": False})
    ''
    """
    if isinstance(value, dict):
        for key, inside in value.items():
            if key in ("auto_map", "trust_remote_code") and inside:
                return key
    inner = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return ""
    return next(filter(None, map(code_in, inner)), "")


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_lines(path: Path) -> list[dict]:
    """The records of a JSONL file that a command of ours wrote."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_log(path: Path) -> list[dict]:
    """The records of a JSONL file that is written while others read it: without a torn line."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("}\n")]


def write_jsonl(path: Path, records):
    """Write one record per line; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_json(path: Path, value):
    """Write one value, indented; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))


def check_values(question, record: dict):
    """Raises TypeError or ValueError for what no answer could be scored against."""
    for name in ("id", "problem", "split"):
        if not isinstance(getattr(question, name), str | int):
            raise TypeError(f"{name} is {getattr(question, name)!r}, not a text")
    if isinstance(record.get("answer_eval", []), str):
        raise TypeError("answer_eval is a text, not a list")
    if not question.answer_eval:
        raise ValueError("answer_eval is empty")
    if question.problem_type == "Numerical":
        low, high = map(float, question.answer_eval)
        if not -math.inf < low <= high < math.inf:
            raise ValueError(f"answer_eval is {low} to {high}, no range of numbers")
