"""Programs that a model wrote are run on any machine that runs the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reward_models.sandbox.run import isolation


@pytest.fixture(scope="session", autouse=True)
def some_isolation() -> Iterator[None]:
    """Where the kernel isolates nothing, the programs here run as for somebody who has allowed that."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            isolation()
        except RuntimeError:
            patch.setenv("DOTS_ALIGN_SANDBOX", "weak")
        yield
    isolation.cache_clear()
