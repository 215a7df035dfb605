"""Records of evaluation data: JSONL, JSON, CSV and Parquet files under one folder, the hub where asked for, or
generated. Every record says where it comes from.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from dots_align.config import Section
from dots_align.data.sources import rows_of


class HubData(Section):
    """A data set on the Hugging Face hub."""

    path: str
    name: str | None = None
    split: str = "test"


class TaskData(Section):
    """Where records lie: `files`, patterns below the folder of evaluation data, of which the first one that matches is
    taken; else `hub`; or `generator`, a function that makes them.
    """

    files: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = Field(default=None, description="of CSV files without a header line")
    hub: HubData | None = None
    generator: str | None = None
    arguments: dict[str, Any] = Field(default_factory=dict, description="of the generator")


@dataclass(frozen=True)
class Record:
    """`values` are the fields, and `file`, the stem of its file's name; `source` is `path:line`."""

    source: str
    values: dict[str, Any]


def read_records(
    data: TaskData, folder: Path | None, tokenizer: Any, limit: int | None, hub: bool, task: str
) -> list[Record]:
    """The records, at most `limit`. Raises ValueError: there are none, or a file cannot be read."""
    if data.generator is not None:
        module, _, function = data.generator.partition(":")
        make = getattr(importlib.import_module(module), function)
        return [Record(f"{task}:{n}", row) for n, row in enumerate(islice(make(tokenizer, **data.arguments), limit))]
    paths = _paths(data, folder)
    if paths:
        rows = (row for path in paths for row in _read(path, data.columns))
        found = [Record(source, values) for source, values in islice(rows, limit)]
    elif hub and data.hub is not None:
        found = _from_hub(data.hub, limit)
    else:
        where = f"under {folder}" if folder else "(no --data folder was given)"
        asked = f", nor was --hub given to read {data.hub.path} from the hub" if data.hub else ""
        raise ValueError(f"task {task}: none of {', '.join(data.files)} {where}{asked}")
    if not found:
        raise ValueError(f"task {task}: {paths[0] if paths else data.hub} holds no records")
    return found


def _paths(data: TaskData, folder: Path | None) -> list[Path]:
    for pattern in data.files if folder else ():
        if found := sorted(folder.glob(pattern)):  # pyright: ignore[reportOptionalMemberAccess]
            return found
    return []


def _read(path: Path, columns: tuple[str, ...] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    name = path.name.removesuffix(".gz")
    stem = Path(name).stem
    if name.endswith(".parquet"):
        rows = rows_of(path)
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            content = stream.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
        readers = {".csv": _csv, ".json": _json}
        rows = readers.get(Path(name).suffix, _jsonl)(path, text, columns)
    for source, values in rows:
        yield source, {**values, "file": stem}


def _csv(path: Path, text: str, columns: tuple[str, ...] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    names = list(columns) if columns else next(reader, [])
    line = reader.line_num + 1
    for cells in reader:
        if cells and len(cells) != len(names):
            raise ValueError(f"{path}:{line}: {len(cells)} columns, expected {len(names)} ({', '.join(names)})")
        if cells:
            yield f"{path}:{line}", dict(zip(names, cells, strict=True))
        line = reader.line_num + 1


def _json(path: Path, text: str, _: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: broken JSON ({error.msg})") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}:1: expected a list of records, found {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield f"{path}:record {number}", _object(row, f"{path}:record {number}")


def _jsonl(path: Path, text: str, _: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: text may hold U+2028
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: broken JSON at column {error.colno} ({error.msg})") from None
            yield f"{path}:{number}", _object(row, f"{path}:{number}")


def _object(row: Any, source: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{source}: expected a JSON object, found {type(row).__name__}")
    return row


def _from_hub(hub: HubData, limit: int | None) -> list[Record]:
    import datasets

    try:
        rows = datasets.load_dataset(hub.path, hub.name, split=hub.split)
    except Exception as error:  # a dozen kinds, of the network and of the data set
        raise ValueError(f"{hub.path}: cannot be read from the hub ({type(error).__name__}: {error})") from error
    return [Record(f"{hub.path}:{n}", dict(row)) for n, row in enumerate(islice(iter(rows), limit))]  # pyright: ignore
