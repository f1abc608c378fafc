"""The order of the house: imports point one way, public names are documented, commands are stated once."""

import ast
import doctest
import inspect
import re
import tomllib
import typing
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import test_migrating

import jaxce

ROOT = Path(__file__).parent.parent
ORDER = [
    ["_types", "_mesh", "_autodiff", "_eager", "_conventions", "_xla"],
    ["_blocks", "_logits", "_targets", "_split", "_slice"],
    ["_arguments", "_rule"],
    ["_inputs", "_head"],
    ["_checks"],
    ["_rows"],
    ["_reduction", "_summary", "_divergence", "_forward_gradient"],
    ["_formula", "_scores", "_elementwise", "_jensen_shannon"],
    ["_losses", "_custom", "_distillation", "_torch"],
    ["_linear"],
    ["imbalance", "torch"],
    ["__init__"],
]
RANK = {module: rank for rank, modules in enumerate(ORDER) for module in modules}
MODULES = {"imbalance", "torch"}


def _functions_of(module):
    return {
        f"{module.__name__}.{name}": value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    }


PUBLIC = {f"jaxce.{name}": getattr(jaxce, name) for name in jaxce.__all__ if name not in MODULES}
PUBLIC |= _functions_of(jaxce.imbalance) | _functions_of(jaxce.torch)
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ([node.module] if node.module != "jaxce" else [f"jaxce.{name.name}" for name in node.names])
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "jaxce").glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_one_way(path):
    for module in _imports(path):
        parts = module.split(".")
        assert parts[0] in {"__future__", "jax", "jaxtyping", "jaxce", "numpy", *_standard_library()}, module
        assert "_src" not in parts
        if parts[0] == "jaxce":
            assert RANK[parts[1]] < RANK[path.stem], f"{path.stem} imports {module}"


def _rooms_below():
    """Of every module those of jaxce that it imports."""
    paths = (ROOT / "jaxce").glob("*.py")
    return {
        path.stem: {module.split(".")[1] for module in _imports(path) if module.startswith("jaxce.")} for path in paths
    }


def _all_below(below):
    """The same with what those import, and so on."""

    @cache
    def reached(module):
        return below[module].union(*map(reached, below[module]))

    return {module: reached(module) for module in below}


def test_the_house_stays_low():
    """The rule is near the ground, beside the door; what a compiler has to be told is in a room of its own."""
    sources = {path.stem: path.read_text() for path in (ROOT / "jaxce").glob("*.py")}
    imports = _rooms_below()

    def depth(name):
        return 1 + max(map(depth, imports[name]), default=0)

    assert depth("_rule") <= 3
    assert max(depth(name) for name in sources if name != "__init__") <= 10
    outside = "".join(source for name, source in sources.items() if name != "_xla")
    assert outside.count("optimization_barrier") + outside.count("platform_dependent") == 0


def test_the_picture_of_the_house_is_true():
    """`docs/draw_house.py` names boxes and arrows. No arrow is drawn where others lead there too."""
    picture = (ROOT / "docs" / "pictures" / "house.svg").read_text()
    drawn = {room: set() for room in re.findall(r'id="room-(\w+)"', picture)}
    for room, imported in re.findall(r'id="import-(\w+)-(\w+)"', picture):
        drawn[room].add(imported)
    imports = _rooms_below()
    below = _all_below(imports)
    assert drawn == {
        room: {imported for imported in of if not any(imported in below[other] for other in of)}
        for room, of in imports.items()
    }


@pytest.mark.parametrize("path", sorted((ROOT / "jaxce").glob("*.py")), ids=lambda path: path.stem)
def test_a_room_is_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 600


def test_types_say_what_things_are():
    """JAX itself has `Any` for a dtype, for a leaf, and for what comes out of `jit`. Elsewhere it says nothing."""
    assert sum(len(re.findall(r"\bAny\b", path.read_text())) for path in (ROOT / "jaxce").glob("*.py")) <= 90


def _standard_library():
    return {
        "ast",
        "types",
        "collections",
        "contextlib",
        "dataclasses",
        "enum",
        "functools",
        "inspect",
        "math",
        "operator",
        "re",
        "reprlib",
        "typing",
        "warnings",
    }


@pytest.mark.parametrize("path", sorted((ROOT / "jaxce").glob("*.py")), ids=lambda path: path.stem)
def test_no_array_is_made_at_import(path):
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            calls = [ast.unparse(node.func) for node in ast.walk(statement) if isinstance(node, ast.Call)]
            assert not any(call.startswith(("jnp.", "jax.numpy.", "lax.")) for call in calls)


def test_the_public_names_are_those_of_the_package():
    assert jaxce.__all__ == sorted(jaxce.__all__)
    assert len(FUNCTIONS) == len(PUBLIC) - 4  # LinearLogits, MeanParts, SparseTargets and Summary
    assert {name.rpartition(".")[2] for name in FUNCTIONS if name.startswith("jaxce.torch")} == {
        "binary_cross_entropy_with_logits",
        "cross_entropy",
        "kl_div",
        "l1_loss",
        "linear_cross_entropy",
        "log_softmax",
        "mse_loss",
        "multi_margin_loss",
        "nll_loss",
        "softmax",
    }
    assert {name for name in FUNCTIONS if name.startswith("jaxce.imbalance")} == {
        "jaxce.imbalance.class_counts",
        "jaxce.imbalance.class_weights",
        "jaxce.imbalance.expected_cost",
        "jaxce.imbalance.logit_adjustment",
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_a_signature_names_its_types(name):
    """As they stand in the source, and not spelled out, which `help` would do; and they can be spelled out."""
    signature = str(inspect.signature(PUBLIC[name]))
    assert len(signature) <= 700
    assert "jaxtyping" not in signature
    assert typing.get_type_hints(PUBLIC[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_have_every_section(name):
    function = FUNCTIONS[name]
    text = inspect.getdoc(function)
    sections = ["Args:", "Returns:", "Raises:", "Example:"] + ["References:"] * (name not in NO_SOURCE)
    positions = [text.find(f"\n{section}\n") for section in sections]
    assert -1 not in positions, sections[positions.index(-1)]
    assert positions == sorted(positions)
    arguments = text[positions[0] : positions[1]]
    for parameter in inspect.signature(function).parameters:
        if not parameter.startswith("_"):
            assert f"\n    {parameter}: " in arguments, parameter
    assert text.splitlines()[0].endswith(".")


NO_SOURCE = {
    "jaxce.custom_loss",
    "jaxce.summarize",
    "jaxce.reduce_losses",
    "jaxce.imbalance.class_counts",
}  # their formula is all there is to them


@pytest.mark.parametrize("name", [*FUNCTIONS, "jaxce.MeanParts"])
def test_public_names_have_a_doctest(name):
    assert sum(len(test.examples) for test in doctest.DocTestFinder().find(PUBLIC[name])) >= 3


def test_a_star_import_takes_no_packages_name():
    assert "torch" not in jaxce.__all__
    assert [name for name in jaxce.__all__ if find_spec(name)] == []


def test_the_version_is_stated_once():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in settings["project"]["dynamic"]
    assert settings["tool"]["hatch"]["version"]["path"] == "jaxce/__init__.py"
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert jaxce.__version__.removesuffix(".dev0") == newest[1]


def test_readme_and_ci_run_the_same_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if "-m pytest" in line]
    assert len(commands) == 1
    assert commands[0].split(" && ")[-1].removeprefix(".venv/bin/") in script


FENCE = re.compile(r"^```(\S+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NO_CODE = {"{eval-rst}", "{toctree}", "text"}  # text: code of other libraries, quoted where it cannot run


PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_every_code_block_is_executed(page):
    """By pytest as doctests, by `test_readme.py` and `test_migrating.py`, and a shown file by its own test."""
    for language, path, code in FENCE.findall((ROOT / page).read_text()):
        if language == "python":
            assert code.startswith(">>> ") == (page != "README.md"), code
        elif language == "{literalinclude}":
            assert (ROOT / page).parent.joinpath(path).resolve().parent == ROOT / "examples" / "recipes"
        elif language == "bash":
            assert page == "README.md"
            assert code.startswith("pip install .") or code.endswith((" -m pytest -n 2 -q\n", " examples/digits.py\n"))
        else:
            assert language in NO_CODE, language


def test_pages_that_pytest_leaves_out_are_executed_elsewhere():
    left_out = {path.name for path in (ROOT / "docs").glob("migrating_*.md")}
    assert left_out == {f"migrating_{page}.md" for page in test_migrating.PAGES}


def test_support_is_stated_once():
    readme = (ROOT / "README.md").read_text()
    assert "3.11" not in readme
    assert "0.10" not in readme
