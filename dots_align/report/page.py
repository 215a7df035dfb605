"""The report page: a template with style, script and the run's data inlined, so that it opens anywhere, offline."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from dots_align.report.collect import Report, collect

SCRIPTS = ("charts.js", "report.js")


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Writes one self-contained HTML page about `run_dir` and returns its path (default `<run_dir>/report.html`).

    `run_dir` is a stage run (run.json) or a pipeline directory whose sub-directories are. Unfinished runs are fine.
    Raises ValueError where there is no run to report on, or where `output` cannot be a file.
    """
    run_dir = Path(run_dir)
    output = run_dir / "report.html" if output is None else Path(output)
    if output.is_dir():
        raise ValueError(f"{output} is a directory: name the file to write, for example {output / 'report.html'}.")
    page = render(collect(run_dir))
    _write_atomically(output, page)
    return output


def render(report: Report) -> bytes:
    """The page as UTF-8."""
    script = "\n".join(_asset(name) for name in SCRIPTS)
    parts = {
        "title": html.escape(f"{report.name} · dots_align report"),
        "policy": _content_policy(script),
        "style": _asset("report.css"),
        "data": _script_safe_json(report),
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


def _script_safe_json(report: Report) -> str:
    """JSON that cannot end its <script> element nor open a comment: no <, > or & survives unescaped."""
    content = {"generated": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), **vars(report)}
    text = json.dumps(content, default=vars, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _write_atomically(path: Path, content: bytes) -> None:
    """A reader (or a killed process) never meets half a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staged.write_bytes(content)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
