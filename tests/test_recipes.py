"""The recipes run as they are shown, are short, and say what they promise."""

import math
import re
import runpy
from pathlib import Path

import jax
import pytest
from marks import daily, needs

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


def _same(loss, on_one):
    assert loss == pytest.approx(on_one, abs=2e-4)


def _inside(*bounds):
    """Of the numbers in turn: a pair of bounds for each."""

    def check(*numbers):
        assert len(numbers) == len(bounds)
        for number, (low, high) in zip(numbers, bounds, strict=True):
            assert low <= number <= high

    return check


def _steps_agree(devices, loss, at_once, error):
    assert devices == 8
    assert loss == pytest.approx(at_once, abs=2e-4)
    assert error < 1e-6


def _one_pass(accuracy, entropy, log_z, loss, perplexity, z_loss, by_optax, share):
    assert 0.05 < accuracy < 0.3
    assert loss == pytest.approx(by_optax, abs=2e-4)
    assert loss == pytest.approx(entropy, rel=0.05)  # the tokens are the model's own
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert z_loss == pytest.approx(1e-4 * log_z**2, rel=0.1)
    assert share < 0.4


def _padding_is_nothing(rows, times, loss, accuracy, mean, loss_at_once, accuracy_at_once):
    assert (rows, times) == (450, 1)
    assert loss == pytest.approx(loss_at_once, abs=2e-4)
    assert accuracy == pytest.approx(accuracy_at_once, abs=2e-4)
    assert abs(mean - loss) > 0.01


def _yes_is_found(recall, micro, macro, weighted_recall, weighted_micro, weighted_macro):
    assert recall + 0.2 < weighted_recall
    assert min(micro, weighted_micro) > 0.6
    assert min(macro, weighted_macro) > 0.25


def _no_square(devices, loss, on_one, share):
    assert devices == 8
    assert loss == pytest.approx(on_one, abs=2e-4)
    assert share < 0.3


def _top_k_is_most(loss, whole, classes, mass):
    assert loss == pytest.approx(whole, rel=0.05)
    assert classes == 64
    assert 0.9 < mass < 1


SAYS = {
    "accumulation_over_devices": ("{} devices: loss {}, of all rows at once {}, gradient off by {}", _steps_agree),
    "contrastive": ("{} devices: loss {}, on one {}; temporaries {} of a device's square", _no_square),
    "data_parallel": ("{} devices, {} to {} labels each: loss {}, on one device {}", _devices_agree),
    "equinox_step": ("loss {} to {}, held-out accuracy {}", _learned),
    "gradient_accumulation": ("loss {}, accumulated {}, gradient off by {}; mean of means {}", _sums_add_up),
    "fine_tuning": (
        "accuracy {}, loss {}, nll {}, perplexity {}, z_part {}",
        _inside((0.2, 0.5), (3, 3.5), (3, 3.5), (20, 30), (0.01, 0.04)),
    ),
    "fsdp": (
        "kernel float32[256@fsdp,8192], its gradient float32[256@fsdp,8192], its moment float32[256@fsdp,8192]; "
        "loss {}, on one device {}",
        _same,
    ),
    "language_model_metrics": (
        "accuracy {}, entropy {}, log_z {}, loss {}, perplexity {}, z_loss {}\n"
        "loss by optax {}, which holds the logits; temporaries here {} of a batch's logits",
        _one_pass,
    ),
    "linen_step": ("loss {} to {}, held-out accuracy {}", _learned),
    "multi_label": (
        "plain: recall {}, average precision micro {}, macro of the rare {}\n"
        "weighted: recall {}, average precision micro {}, macro of the rare {}",
        _yes_is_found,
    ),
    "multi_token": ("loss {}, of the heads {}, {}, {}", _inside(*[(8.3, 9.3)] * 4)),
    "multiple_choice": ("{} questions, accuracy {}, log-likelihood {}", _inside((20, 20), (0.6, 1), (-20, -1))),
    "nnx_step": ("loss {} to {}, held-out accuracy {}", _learned),
    "padded_evaluation": (
        "{} rows, compiled {} time: loss {}, accuracy {}; mean of means {}\nscikit-learn, all at once: {}, {}",
        _padding_is_nothing,
    ),
    "policy_gradient": (
        "loss {}, clip_fraction {}, entropy {}, kl {}",
        _inside((-2, 2), (0.01, 0.5), (7, 8.4), (0, 0.1)),
    ),
    "preference": ("loss {} to {}, accuracy {}", _inside((0.693, 0.6932), (0, 0.5), (1, 1))),
    "segmentation": (
        "{}% void, loss {} to {}, held-out mean IoU {}",
        _inside((1, 10), (0.9, 1.5), (0, 0.1), (0.9, 1)),
    ),
    "smoothing_and_weights": (
        "recall of the rare {}, with class weights {}; loss {}, by hand {}",
        _weights_help,
    ),
    "token_scaling": ("loss {}, nll {}", _inside((0.05, 0.4), (3, 3.5))),
    "top_k_teacher": ("loss {}, of all classes {}; the top {} have {}", _top_k_is_most),
    "teacher_student": ("held-out accuracy: teacher {}, student alone {}, with the teacher {}", _teacher_helps),
}


@pytest.mark.parametrize("name", daily(SAYS, []))
def test_recipe(name, capsys):
    path = ROOT / "examples" / "recipes" / f"{name}.py"
    for package in re.findall(r"^(?:import|from) (equinox|flax|optax|sklearn)", path.read_text(), re.MULTILINE):
        needs(package)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        runpy.run_path(str(path), run_name="__main__")
    sentence, check = SAYS[name]
    numbers = re.fullmatch(re.escape(sentence + "\n").replace(r"\{\}", "([0-9.e+-]+)"), capsys.readouterr().out)
    assert numbers
    check(*map(float, numbers.groups()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_short(path):
    assert len(path.read_text().splitlines()) <= 40


def test_the_pages_show_every_recipe_once():
    assert {path.stem for path in RECIPES} == SAYS.keys()
    page = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("recipes", "post_training"))
    for path in RECIPES:
        assert page.count(f"](../examples/recipes/{path.name})") == 1
        assert page.count(f"```{{literalinclude}} ../examples/recipes/{path.name}\n") == 1
