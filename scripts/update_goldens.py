#!/usr/bin/env python
"""Writes the goldens of tests/golden anew. They move by this script alone; the commit that moves them says why.

scripts/update_goldens.py            # writes them
scripts/update_goldens.py --check    # exit status 1, and a list, if one would change
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dots_align.evals.task import example_prompts

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "eval_prompts.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, say what would change")
    options = parser.parse_args()
    new = example_prompts()
    old = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.is_file() else {}
    changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    print(f"{GOLDEN.name}: {', '.join(changed) or 'nothing changes'}")
    if options.check:
        sys.exit(bool(changed))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(new, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
