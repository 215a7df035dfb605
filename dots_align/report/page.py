"""The report page: a template with style, script and the runs' data inlined, so that it opens anywhere, offline."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from dots_align.report.collect import Report, collect

BASE_SCRIPTS = ("base.js", "charts.js", "heatmap.js")  # what any page of this look needs
SCRIPTS = (*BASE_SCRIPTS, "samples.js", "report.js")


def write_report(run_dirs: Path | Sequence[Path], output: Path | None = None) -> Path:
    """Writes one self-contained HTML page about a run, or about several to compare, and returns its path.

    A run directory is a stage run (run.json) or a pipeline directory whose sub-directories are. Unfinished runs are
    fine. By default the page is `report.html` in the run directory; of several runs, `compare.html` where they lie.
    Raises ValueError where there is no run to report on, or where `output` cannot be a file.
    """
    paths = [Path(run_dirs)] if isinstance(run_dirs, (str, Path)) else [Path(path) for path in run_dirs]
    if output is None:
        inside = paths[0] if len(paths) == 1 else Path(os.path.commonpath([path.resolve() for path in paths]))
        output = inside / ("report.html" if len(paths) == 1 else "compare.html")
    output = Path(output)
    if output.is_dir():
        raise ValueError(f"{output} is a directory: name the file to write, for example {output / 'report.html'}.")
    write_atomically(output, render(collect(paths)))
    return output


def render(report: Report) -> bytes:
    """The page as UTF-8."""
    title = " · ".join(run.name for run in report.runs)
    return render_page(f"{title} · dots_align report", {"runs": report.runs}, SCRIPTS, report.blobs.content)


def render_page(title: str, data: Mapping[str, Any], scripts: Sequence[str], blobs: Mapping[str, str]) -> bytes:
    """Any page of this look, as UTF-8.

    Args:
        data: what the script finds as JSON; dataclasses are written as objects.
        scripts: files of this package, in the order in which they run.
        blobs: compressed data by element id, as `Blobs` makes it.
    """
    script = "\n".join(_asset(name) for name in scripts)
    generated = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    parts = {
        "title": html.escape(title),
        "policy": _content_policy(script),
        "style": _asset("report.css"),
        "data": _script_safe_json({"generated": generated, **data}),
        "blobs": "\n".join(
            f'<script type="application/gzip" id="{name}">{text}</script>' for name, text in blobs.items()
        ),
        "script": script,
    }
    # One pass over the template: a `{{script}}` inside the data is data and stays as it is.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("template.html"))
    # A lone surrogate in model output has no UTF-8; backslashreplace spells it as JSON does.
    return page.encode("utf-8", errors="backslashreplace")


def _asset(name: str) -> str:
    return resources.files("dots_align.report").joinpath(name).read_text(encoding="utf-8")


def _content_policy(script: str) -> str:
    """Nothing is fetched, and the only script that runs is ours: a second wall behind the escaping of model output."""
    # The parser hands the script over with the newlines the template puts around it.
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _script_safe_json(content: Mapping[str, Any]) -> str:
    """JSON that cannot end its <script> element nor open a comment: no <, > or & survives unescaped."""
    text = json.dumps(content, default=vars, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def write_atomically(path: Path, content: bytes) -> None:
    """A reader (or a killed process) never meets half a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staged.write_bytes(content)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
