"""Fixtures that every test may use."""

import os
from pathlib import Path

# Before anything imports huggingface_hub or tokenizers, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The servers that tests start are on this machine, whatever proxy leads out of it.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

# A process of ours must not depend on it: it hides output that is never flushed.
os.environ.pop("PYTHONUNBUFFERED", None)

import pytest
import torch
from hypothesis import settings

REPO_ROOT = Path(__file__).resolve().parents[1]

# No deadline: the first example of a property pays for lazy imports. In CI the same examples every time.
settings.register_profile("dots_align", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("dots_align")

# Test processes that run beside each other, one for each core, leave the threads of the others alone.
if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
else:
    torch.set_num_threads(os.cpu_count() or 1)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout: recipes, scripts and docs lie under it."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real benchmark data, kept outside the repository: $DOTS_ALIGN_DATA, or shared/data beside the checkout."""
    path = Path(os.environ.get("DOTS_ALIGN_DATA") or REPO_ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no benchmark data at {path} (set DOTS_ALIGN_DATA to a folder that has it)")
    return path
