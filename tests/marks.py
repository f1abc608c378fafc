"""Which of a table's rows run every day; the others run with `--thorough` alone."""

import pytest


def daily(names, chosen):
    """Parameters of the names, of which the chosen ones run every day."""
    chosen = set(chosen)
    assert chosen <= set(names), chosen - set(names)
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.thorough) for name in names]


def except_for(names, left_out):
    """Parameters of the names, of which all but some run every day."""
    return daily(names, set(names) - set(left_out))
