"""The examples run as they are shown; the recipes are in `test_recipes.py`, two processes in `test_processes.py`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from marks import needs

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(script, *options, cwd):
    """What an example prints, with warnings as errors."""
    for package in ("flax", "matplotlib", "optax", "sklearn", "tokenizers", "tqdm"):
        needs(package)
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *options]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


SAYS = {
    "digits.py --smoke": "held-out accuracy: 0.",
    "language_model.py --smoke": "temporaries",
    "loss_surfaces.py": "loss 8, gradient (4, -4)",
    "policy.py --smoke": "largest difference between the curves: ",
    "segmentation.py --smoke": "same gradient: True",
}


@pytest.mark.thorough
@pytest.mark.parametrize("command", SAYS)
def test_example(command, tmp_path):
    printed = run(*command.split(), cwd=tmp_path)
    assert SAYS[command] in printed
    pictures = list(tmp_path.iterdir())
    assert pictures
    assert written(printed) == {picture.name for picture in pictures}
    assert min(picture.stat().st_size for picture in pictures) > 10_000


def written(printed):
    """The paths that an example says it wrote."""
    return set(re.findall(r"^wrote (\S+)$", printed, re.MULTILINE))


@pytest.mark.thorough
def test_rare_classes(tmp_path):
    printed = run("rare_classes.py", "--smoke", "--output", "results", cwd=tmp_path)
    page = (tmp_path / "results" / "rare_classes.md").read_text()
    assert printed.endswith(page)
    assert written(printed) == {f"results/{file.name}" for file in (tmp_path / "results").iterdir()}
    assert "nan" not in page
    settings = ["unweighted", "balanced", "effective number", "inverse sqrt", "focal loss"]
    settings += [f"by hand, debris {weight}" for weight in (0.1, 0.2, 0.4, 0.8, 1, 2, 4, 10)]
    for kind in ("expected", "least"):
        settings += [f"{beside}{kind} cost {cost}" for beside in ("", "by hand, ") for cost in (1, 2, 4, 8)]
    for name in ("logit adjustment", "adjusted afterwards"):
        settings += [name, *(f"{name}, debris +{shift}" for shift in (1, 2, 3, 4))]
    settings += ["adjusted to rare alike", "adjusted to rare as trained"]
    assert [first_cells(page).count(name) for name in settings] == [2] * len(settings)
    for picture in ("tradeoff", "confusion"):
        assert (tmp_path / "results" / f"rare_classes_{picture}.png").stat().st_size > 10_000


def first_cells(page):
    return [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")]


def test_documented_rows_are_results():
    results = (ROOT / "docs" / "pictures" / "rare_classes.md").read_text().splitlines()
    study = (ROOT / "docs" / "imbalance.md").read_text().partition("## A study")[2]
    rows = [line for line in study.splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    assert set(rows) <= set(results)
