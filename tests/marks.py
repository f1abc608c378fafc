"""Which of a table's rows run every day, the others with `--thorough` alone; and what a test needs to be installed."""

import pytest


def daily(names, chosen):
    """Parameters of the names, or of tuples of them, of which the chosen ones run every day."""
    chosen = set(chosen)
    assert chosen <= set(names), chosen - set(names)

    def thorough(name):
        return pytest.param(*(name if isinstance(name, tuple) else [name]), marks=pytest.mark.thorough)

    return [name if name in chosen else thorough(name) for name in names]


def except_for(names, left_out):
    """Parameters of the names, of which all but some run every day."""
    return daily(names, set(names) - set(left_out))


PROJECTS = {"jax_plugins": "jax-cuda13-plugin jax-cuda13-pjrt", "orbax": "orbax-checkpoint", "sklearn": "scikit-learn"}


def needs(module):
    """The module, or a skip that says what to install."""
    __tracebackhide__ = True  # a skip is where the test is
    package = module.partition(".")[0]
    return pytest.importorskip(module, reason=f"needs {module}: pip install {PROJECTS.get(package, package)}")
