"""The recipes run as they are shown, are short, and say what they promise."""

import re
import runpy
from pathlib import Path

import jax
import pytest
from marks import daily

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.py"))


def _learned(first, last, accuracy):
    assert last < 0.7 < first
    assert accuracy > 0.95


def _sums_add_up(loss, accumulated, error, mean):
    assert accumulated == pytest.approx(loss, abs=2e-4)
    assert abs(mean - loss) > 0.01
    assert error < 1e-6


def _weights_help(plain, weighted, loss, by_hand):
    assert plain < 0.5
    assert weighted > 0.8
    assert loss == pytest.approx(by_hand, abs=2e-4)


def _teacher_helps(teacher, alone, taught):
    assert alone + 0.15 < taught
    assert teacher > 0.9


def _devices_agree(devices, fewest, most, loss, on_one):
    assert devices == 8
    assert fewest < most
    assert loss == pytest.approx(on_one, abs=2e-4)
    assert loss < 2


SAYS = {
    "data_parallel": ("{} devices, {} to {} labels each: loss {}, on one device {}", _devices_agree),
    "equinox_step": ("loss {} to {}, held-out accuracy {}", _learned),
    "gradient_accumulation": ("loss {}, accumulated {}, gradient off by {}; mean of means {}", _sums_add_up),
    "linen_step": ("loss {} to {}, held-out accuracy {}", _learned),
    "nnx_step": ("loss {} to {}, held-out accuracy {}", _learned),
    "smoothing_and_weights": (
        "recall of the rare {}, with class weights {}; loss {}, by hand {}",
        _weights_help,
    ),
    "teacher_student": ("held-out accuracy: teacher {}, student alone {}, with the teacher {}", _teacher_helps),
}


@pytest.mark.parametrize("name", daily(SAYS, ["gradient_accumulation"]))
def test_recipe(name, capsys):
    path = ROOT / "examples" / "recipes" / f"{name}.py"
    for package in re.findall(r"^(?:import|from) (equinox|flax|optax|sklearn)", path.read_text(), re.MULTILINE):
        pytest.importorskip(package)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        runpy.run_path(str(path), run_name="__main__")
    sentence, check = SAYS[name]
    numbers = re.fullmatch(sentence.replace("{}", "([0-9.e+-]+)") + "\n", capsys.readouterr().out)
    assert numbers
    check(*map(float, numbers.groups()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_short(path):
    assert len(path.read_text().splitlines()) <= 40


def test_the_page_shows_every_recipe():
    assert {path.stem for path in RECIPES} == SAYS.keys()
    page = (ROOT / "docs" / "recipes.md").read_text()
    for path in RECIPES:
        assert page.count(f"](../examples/recipes/{path.name})") == 1
        assert page.count(f"```{{literalinclude}} ../examples/recipes/{path.name}\n") == 1
