"""The benchmarks run, and who is compared in them computes the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cases, contenders, timing

ROOT = Path(__file__).parent.parent
DETAILS = "time ÷ floor"  # a column of the table that has the errors


def _rows(text, column):
    """The table with a column of that name, as dictionaries."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if column in line and line.startswith("|"))
    header = [cell.strip() for cell in lines[start].strip("|").split("|")]
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        yield dict(zip(header, [cell.strip() for cell in line.strip("|").split("|")], strict=True))


@pytest.mark.thorough
def test_smoke_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--smoke", "--contenders", "jaxce", "optax", "--output", tmp_path]
    printed = subprocess.run([*command, "--name", "here"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {file.name for file in tmp_path.iterdir()} == {"here.md", "here-dense.png", "here-linear.png"}
    assert (tmp_path / "here.md").read_text() + "\n" == printed
    assert printed.startswith("Machine: ")
    rows = list(_rows(printed, DETAILS))
    assert [row["contender"] for row in rows] == ["jaxce", "optax"] * len(cases.SMOKE)
    for row, case in zip(rows, [case for case in cases.SMOKE for _ in range(2)], strict=True):
        loss_tolerance, gradient_tolerance = timing.TOLERANCES[case.dtype]
        assert float(row["loss error"]) <= loss_tolerance
        assert float(row["gradient error"]) <= gradient_tolerance
        assert float(row["time ÷ jaxce"]) > 0
    worst = {row["rows"]: row for row in _rows(printed, "jaxce, loss")}
    assert float(worst["target ahead by 40 nats"]["jaxce, loss"]) < 50
    assert float(worst["target ahead by 40 nats"]["optax, loss"]) > 1e6


def test_a_wrong_contender_is_named_and_not_timed(monkeypatch):
    def twice(case):
        loss = contenders.JAX_LOSSES["jaxce"](case)
        return lambda logits, targets: 2 * loss(logits, targets)

    monkeypatch.setitem(contenders.CONTENDERS, "twice", contenders.on_jax("twice", twice))
    monkeypatch.setitem(contenders.CONTENDERS, "none", lambda case: None)
    plan = timing.Plan(["jaxce", "twice", "none"], rounds=2, seconds=1)
    results, seconds = timing.measure(cases.SMOKE[0], plan)
    assert set(seconds) == {"jaxce", "floor"}
    assert [result.note.partition(":")[0] for result in results] == ["", "wrong", "–"]
    assert results[1].loss_error == pytest.approx(1, rel=1e-5)
