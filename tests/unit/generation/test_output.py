"""The output file: what is in it belongs to one run, every line is whole and there once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dots_align.generation.output import Output

HASHES = [f"{n:016x}" for n in range(6)]
IDENTITY = {"temperature": 1.0, "checkpoint": "abc"}


def begun(path: Path, identity: dict = IDENTITY, overwrite: bool = False) -> tuple[Output, set[int]]:
    output = Output(path, HASHES)
    return output, output.begin(identity, {}, overwrite)


def indices(path: Path) -> list[int]:
    return [json.loads(line)["index"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.jsonl"
    output, done = begun(path)
    assert done == set()
    with output.writing():
        for count, index in enumerate((4, 0, 2), start=1):
            output.write(index, {"samples": ["\u2028 line separators stay \n"]})
            assert len(indices(path)) == count
    output.close()
    assert begun(path)[1] == {0, 2, 4}


@pytest.mark.parametrize("left", ["", "{", '{"index": 3, "hash": "0', "\n", '{"index": 5}\n', "[]\n", "\x00\x00\x00"])
def test_what_a_dying_process_leaves_is_dropped(tmp_path: Path, left: str) -> None:
    path = tmp_path / "out.jsonl"
    output, _ = begun(path)
    with output.writing():
        output.write(1, {"samples": []})
    output.close()
    whole = path.read_bytes()
    path.write_bytes(whole + left.encode())
    output, done = begun(path)
    assert done == {1}
    assert path.read_bytes() == whole
    with output.writing():
        output.write(3, {"samples": []})
    assert indices(path) == [1, 3]


def test_a_whole_line_without_its_end_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    output, _ = begun(path)
    with output.writing():
        output.write(1, {"samples": []})
    output.close()
    path.write_bytes(path.read_bytes()[:-1])
    assert begun(path)[1] == set()
    assert path.read_bytes() == b""


def test_parts_of_other_processes_come_in_and_errors_are_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    output, _ = begun(path)
    other = Output(path, HASHES, rank=1)
    with output.writing(), other.writing():
        output.write(0, {"samples": []})
        other.write(1, {"samples": []})
        other.write(3, {"error": "too long"})
    assert indices(path) == [0]
    assert output.collect(keep_errors=True) == {0, 1, 3}
    assert indices(path) == [0, 1, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]
    output.close()
    assert begun(path)[1] == {0, 1}


def test_two_processes_never_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first, _ = begun(path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="another process is writing it"):
            begun(path, overwrite=overwrite)
    first.close()
    begun(path)


def test_of_processes_that_begin_together_one_gets_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, make, other = tmp_path / "out.jsonl", Path.mkdir, []

    def meanwhile(*arguments: Any, **options: Any) -> None:
        make(*arguments, **options)
        monkeypatch.setattr(Path, "mkdir", make)
        other.append(begun(path)[0])

    monkeypatch.setattr(Path, "mkdir", meanwhile)  # when it is known that nobody has the file
    with pytest.raises(ValueError, match="another process is writing it"):
        begun(path)
    with other[0].writing():
        other[0].write(1, {"samples": []})
    other[0].close()
    assert begun(path)[1] == {1}


def test_a_record_that_was_half_written_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.with_name("out.jsonl.run.json").write_text('{"identity": {"temp')
    output, done = begun(path)
    assert done == set()
    with output.writing():
        output.write(1, {"samples": []})
    output.close()
    assert begun(path)[1] == {1}


def test_another_run_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    output, _ = begun(path)
    with output.writing():
        output.write(1, {"samples": []})
    output.close()
    with pytest.raises(ValueError, match=r"other settings \(checkpoint: \"abc\" -> \"abd\"\); choose another file"):
        begun(path, {**IDENTITY, "checkpoint": "abd"})
    assert indices(path) == [1]
    output, done = begun(path, {**IDENTITY, "checkpoint": "abd"}, overwrite=True)
    assert done == set()
    assert path.read_bytes() == b""


def test_a_file_that_was_deleted_may_be_begun_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    output, _ = begun(path)
    output.close()
    path.unlink()
    other = {**IDENTITY, "temperature": 0.0}
    output, _ = begun(path, other)
    with output.writing():
        output.write(1, {"samples": []})
    output.close()
    assert begun(path, other)[1] == {1}


def test_a_line_of_other_prompts_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    output, _ = begun(path)
    output.close()
    path.write_text('{"index": 2, "hash": "ffff", "samples": []}\n')
    with pytest.raises(ValueError, match=r"out.jsonl:1: a line of another prompt 2"):
        begun(path)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this is a directory"):
        begun(tmp_path)
