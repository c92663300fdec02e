"""Rows of a corpus too large for memory: JSON lines, read one at a time when asked for."""

import json
import mmap
from pathlib import Path

import numpy as np

from files.records import MISREAD, KnowledgeBaseError, without_halves


class JsonLines:
    """Rows of a JSONL corpus; processes share the file's pages.

    field: give this text of a record only. Raises KnowledgeBaseError, naming the line, where a row
    is no record, has another id than its number, or no such text.
    """

    def __init__(self, path: Path, field: str | None = None):
        self.path = path
        self.field = field
        self.map = b""
        with open(path, "rb") as file:
            ends = np.cumsum(np.fromiter(map(len, file), np.int64))
            if len(ends):  # an empty file cannot be mapped
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.starts = np.concatenate([[0], ends])  # a row lies between its start and the next

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int):
        if not 0 <= row < len(self):
            raise IndexError(row)  # which ends a loop over the rows
        line = self.map[self.starts[row] : self.starts[row + 1]]
        try:
            record = json.loads(line)
            if b"\\u" in line:
                record = without_halves(record)
            number = int(record["id"])
            value = record[self.field] if self.field else record
            if self.field and not isinstance(value, str):
                raise TypeError(f"{self.field} is {str(value)[:40]!r}, not a text")
        except MISREAD as error:
            raise KnowledgeBaseError(
                f"{self.path}, line {row + 1}: no row of a corpus "
                f"({type(error).__name__}: {str(error)[:100]}); build or download it again"
            ) from None
        if number != row:
            raise KnowledgeBaseError(
                f"{self.path}, line {row + 1}: the id is {record['id']!r}, "
                "but ids must be row numbers from 0"
            )
        return value
