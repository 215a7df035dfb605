"""The chat template in the words that every jinja engine knows."""

from __future__ import annotations

import re

_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")


def portable_template(template: str) -> str:
    """The chat template without `{% generation %}` tags, which only transformers knows; it renders exactly the same.

    A tag next to white space becomes an empty comment with the same trimming marks: it may have been trimming there.
    """

    def replacement(tag: re.Match[str]) -> str:
        around = template[max(tag.start() - 1, 0) : tag.start()] + template[tag.end() : tag.end() + 1]
        return f"{{#{tag[1]} {tag[2]}#}}" if any(c.isspace() for c in around) else ""

    return _GENERATION_TAG.sub(replacement, template)
