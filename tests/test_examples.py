"""The examples run as they are shown; that of two processes is in `test_processes.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("script", "options", "says"),
    [
        ("digits.py", ["--smoke"], "held-out accuracy: 0."),
        ("language_model.py", ["--smoke"], "temporaries"),
        ("linen_step.py", [], "accuracy"),
    ],
)
def test_example(script, options, says, tmp_path):
    for package in ("flax", "matplotlib", "optax", "sklearn", "tokenizers", "tqdm"):
        pytest.importorskip(package)
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *options]
    result = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert says in result.stdout
    if "--smoke" in options:
        assert (tmp_path / script).with_suffix(".png").stat().st_size > 10_000
