"""A JSONL file that grows a line at a time and survives the death of whoever writes it.

Beside `out.jsonl` lies `out.jsonl.run.json`, which says what run it belongs to. Of several processes the main one
writes the file itself and the others `out.jsonl.part-1` and so on, which the next start, or the end, brings together.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from dots_align import __version__
from dots_align.config import recipe_differences
from dots_align.runtime import logger, now


class Output:
    """The output file of a run of `generate`, as one process sees it.

    Args:
        path: the file.
        hashes: of the prompts, in their order; a line carries its prompt's index and hash.
        rank: of this process; 0 opens, collects and closes.
    """

    def __init__(self, path: Path, hashes: Sequence[str], rank: int = 0) -> None:
        self.path, self.hashes, self.rank = path, hashes, rank
        self.record = path.with_name(f"{path.name}.run.json")
        self._lock: BinaryIO | None = None

    def close(self) -> None:
        """Lets others have the file; the end of the process does it too, however it ends."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # ---------------------------------------------------------------------------------------------- the main process

    def begin(self, identity: dict[str, Any], about: dict[str, Any], overwrite: bool) -> set[int]:
        """Makes the file this run's, fresh or begun earlier; returns the prompts that are done.

        Args:
            identity: what has to be equal for lines of two runs to stand in one file.
            about: recorded beside it, for people.
            overwrite: delete what is there.

        Raises:
            ValueError: the file is no output of this command, of a run that differs, or being written.
        """
        if self.path.is_dir():
            raise ValueError(f"{self.path}: this is a directory; give a file to write")
        if self.record.is_file():
            self._lock = self._locked("r+b")
        if overwrite and self._lock is not None:
            for path in (self.path, *self._parts()):
                path.unlink(missing_ok=True)
        if any(path.is_file() and path.stat().st_size for path in (self.path, *self._parts())):
            self._check(identity)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self._lock = self._locked("xb")
            self._write_record({"identity": identity, **about, "created": now(), "version": __version__})
        return self.collect(keep_errors=False)

    def _check(self, identity: dict[str, Any]) -> None:
        remedy = "choose another file"
        try:
            found = json.loads(self.record.read_text(encoding="utf-8"))["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path}: not empty, and nothing that generate began; {remedy}") from None
        if changes := recipe_differences(found, identity):
            raise ValueError(
                f"{self.path}: it was begun with other settings ({'; '.join(changes)}); {remedy}, or give "
                "overwrite=true to delete it"
            )

    def _locked(self, mode: str) -> BinaryIO:
        """The record, opened or made for this process alone. It stays the same file as long as there is one: a lock on
        a file that another takes the place of keeps nobody out.
        """
        taken = ValueError(f"{self.path}: another process is writing it; wait for it, or end it")
        try:
            lock = cast(BinaryIO, self.record.open(mode))
        except FileExistsError:
            raise taken from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise taken from None
        except OSError as error:
            logger.warning("%s: cannot be locked (%s); let no other process write it", self.record, error)
        return lock

    def _write_record(self, value: dict[str, Any]) -> None:
        """There is no line of the run yet: half a record, should this process die here, is written anew."""
        assert self._lock is not None
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n")
        self._lock.flush()

    def collect(self, keep_errors: bool) -> set[int]:
        """Brings the file and its parts together; returns the prompts that are in it. Lines that are torn, or were
        written before, are dropped; lines of prompts that could not be done too, unless `keep_errors`.
        """
        parts, done = self._parts(), set[int]()
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("wb") as out:
            for source in (self.path, *parts):
                for line, index, failed in self._lines(source):
                    if index not in done and (keep_errors or not failed):
                        done.add(index)
                        out.write(line)
        os.replace(temporary, self.path)
        for part in parts:
            part.unlink()
        return done

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.part-*"))

    def _lines(self, path: Path) -> Iterator[tuple[bytes, int, bool]]:
        """(line, index of its prompt, whether that failed) of whole lines."""
        if not path.is_file():
            return
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    found = json.loads(line)
                    index, given, failed = found["index"], found["hash"], "error" in found
                except (ValueError, KeyError, TypeError):
                    continue
                if not 0 <= index < len(self.hashes) or given != self.hashes[index]:
                    raise ValueError(f"{path}:{number}: a line of another prompt {index}; choose another file")
                if line.endswith(b"\n"):
                    yield line, index, failed

    # ------------------------------------------------------------------------------------------------- every process

    @contextlib.contextmanager
    def writing(self) -> Iterator[Output]:
        path = self.path if self.rank == 0 else self.path.with_name(f"{self.path.name}.part-{self.rank}")
        with path.open("ab") as self._stream:
            yield self

    def write(self, index: int, values: dict[str, Any]) -> None:
        """Appends one prompt's line and hands it to the operating system."""
        line = {"index": index, "hash": self.hashes[index], **values}
        self._stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()
