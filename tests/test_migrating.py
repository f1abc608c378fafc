"""The pages for those who come from elsewhere are executed, and their losses are those of the library they come from.

A code block below the library's name in bold is in its words, one below **jaxce** in ours, and one without a name in
both. A case is a block that binds `theirs` and the next one, which binds `ours`: they must print the same, and where
the library is installed, be the same to 1e-6. Where it is not, its blocks are left out, and all that is bound to `ours`
within a case must agree.
"""

import doctest
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {"pytorch": "torch", "optax": "optax", "keras": "keras"}  # and what has to be installed
PAGES |= dict.fromkeys(["t5x_maxtext", "trainers", "vision_trainers"])
BLOCK = re.compile(r"^(?:\*\*(?P<owner>[\w /]+)\*\*\n\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    owner: str | None
    line: int
    examples: list[doctest.Example]

    def binds(self, name):
        return any(example.source.startswith(f"{name} = ") for example in self.examples)

    def prints(self):
        return [example.want for example in self.examples if example.want and not example.exc_msg]


@pytest.mark.thorough
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # of PyTorch to itself
def test_page(page, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        _run(page, _blocks((DOCS / f"migrating_{page}.md").read_text()), PAGES[page])


@pytest.mark.parametrize("page", PAGES)
def test_cases_print_the_same(page):
    cases = _cases(_blocks((DOCS / f"migrating_{page}.md").read_text()))
    assert len(cases) >= 9
    for theirs, ours in cases:
        assert ours.owner == "jaxce", theirs.line
        assert ours.binds("ours"), ours.line
        assert re.search(r"\d|nan", theirs.prints()[0])
        assert theirs.prints()[0] == ours.prints()[0], ours.line


CASE = """**it**

```python
>>> theirs = 0.12341

```

**jaxce**

```python
>>> ours = {}
>>> print(f"{{ours:.4f}}")
0.1234

```
"""


def test_a_wrong_port_is_seen():
    """By its value where it prints the same, and by what it prints where there is nothing to compare it with."""
    _run("right", _blocks(CASE.format("0.12341")), None)
    with pytest.raises(pytest.fail.Exception, match="Not equal to tolerance"):
        _run("wrong", _blocks(CASE.format("0.12342")), None)
    with pytest.raises(pytest.fail.Exception, match="Expected"):
        _run("wrong", _blocks(CASE.format("0.12346")), "not_installed")


def _blocks(text):
    parser = doctest.DocTestParser()
    return [
        Block(match["owner"], text.count("\n", 0, match.start("code")), parser.get_examples(match["code"]))
        for match in BLOCK.finditer(text)
    ]


def _cases(blocks):
    """Every block that binds `theirs`, and the one that says the same by jaxce."""
    named = [block for block in blocks if block.owner]
    return [(block, named[index + 1]) for index, block in enumerate(named) if block.binds("theirs")]


def _run(page, blocks, library):
    installed = library is None or find_spec(library) is not None
    examples = []
    for block in blocks:
        if block.owner in (None, "jaxce") or installed:
            examples += _checked(block, installed)
    names = {"_agree": _agree, "theirs": None}
    report = []
    test = doctest.DocTest(examples, names, page, f"migrating_{page}.md", 0, None)
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    if report:
        pytest.fail("".join(report), pytrace=False)


def _checked(block, installed):
    """The examples of a block, and a comparison after every `ours`."""
    if block.binds("ours") and not installed:
        yield doctest.Example("theirs = None\n", "")
    for example in block.examples:
        example.lineno += block.line
        yield example
        if example.source.startswith("ours = "):
            yield doctest.Example("theirs = _agree(theirs, ours)\n", "", lineno=example.lineno)


def _agree(theirs, ours):
    """Returns what the next `ours` of the case has to agree with."""
    if theirs is None:
        return ours
    for expected, actual in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(_to_numpy(actual), _to_numpy(expected), rtol=1e-6, atol=1e-7, strict=True)
    return theirs


def _to_numpy(array):
    """In float64, whatever the library and the dtype."""
    if hasattr(array, "detach"):
        array = array.detach().double()
    return np.asarray(array, np.float64)
