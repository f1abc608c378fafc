"""The examples run as they are shown."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("script", "options", "says", "draws"),
    [
        ("digits.py", ["--smoke"], "held-out accuracy: 0.", True),
        ("language_model.py", ["--smoke"], "temporaries", True),
        ("linen_step.py", [], "accuracy", False),
        ("sharded_head.py", ["--smoke"], "largest relative difference: ", False),
    ],
)
def test_example(script, options, says, draws, tmp_path):
    for package in ("flax", "matplotlib", "optax", "orbax.checkpoint", "sklearn", "tokenizers", "tqdm"):
        pytest.importorskip(package)
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *options]
    result = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert says in result.stdout
    if draws:
        assert (tmp_path / script).with_suffix(".png").stat().st_size > 10_000
