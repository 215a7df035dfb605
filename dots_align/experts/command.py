"""`dots-align experts`: measures, writes the page and the JSON beside it, and says what is in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dots_align.experts.analysis import analyse
from dots_align.experts.domains import parse_domains
from dots_align.experts.result import as_text, as_values
from dots_align.report.page import BASE_SCRIPTS, render_page, write_atomically


def run(
    paths: Sequence[Path],
    data: list[str],
    output: Path | None = None,
    max_tokens: int = 100_000,
    max_length: int = 2048,
    print_json: bool = False,
) -> str:
    """Returns what to print.

    Args:
        paths: checkpoints, or run directories for all of theirs. data: domains as `[NAME=]FILE[:FIELD,FIELD]`.
        output: the page; its JSON lies beside it. Default: `<last checkpoint>-experts.html`.
    """
    if output is None:
        last = paths[-1].resolve()
        output = last.with_name(f"{last.name}-experts.html")
    if output.is_dir():
        raise ValueError(f"{output} is a directory: name the file to write, for example {output / 'experts.html'}.")
    if output.suffix != ".html":
        raise ValueError(f"--output {output}: the page is an .html file; its JSON is written beside it.")
    found = analyse(paths, parse_domains(data), max_tokens, max_length)
    values = as_values(found)
    text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
    write_atomically(output.with_suffix(".json"), text.encode())
    title = f"experts of {found.checkpoints[-1].name} · dots_align"
    write_atomically(output, render_page(title, {"experts": values}, (*BASE_SCRIPTS, "experts.js"), {}))
    return text.rstrip() if print_json else f"{as_text(found)}\n\n{output}"
