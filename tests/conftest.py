"""Settings of the whole suite: 8 host devices, no promotion of dtype or rank, float64 on request."""

import gc
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_parallel_codegen_split_count=1"  # small programs take longer to compile in parts
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # where an operation was written, for profiles alone

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

LONG_PAGES = {f"{name}.md" for name in ("choosing", "imbalance", "linear_head", "mathematics", "numerics")}
LONG_PAGES |= {"post_training.md", "quickstart.md", "scaling.md"}


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="also run what is too long for every day")


def pytest_configure(config):
    """Shapes are checked where the rule is traced, which takes its time."""
    if config.getoption("--thorough"):
        with install_import_hook(["jaxce._rule", "jaxce._rows"], "beartype.beartype"):
            import jaxce  # noqa: F401


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Whole files to a worker, so that what a file compiles once is compiled once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.name in LONG_PAGES:
            item.add_marker("thorough")
    if not config.getoption("--thorough"):
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]


def pytest_collection_finish(session):
    """What was imported stays, and is not looked through again whenever there may be garbage."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    examples = sum(count for report in reports for name, count in report.user_properties if name == "examples")
    if examples:
        terminalreporter.write_line(f"{examples} random examples")


@pytest.fixture(autouse=True)
def strict_promotion():
    """No array of the library changes its dtype, or gets an axis, unasked."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    """Float64 for the test that asks for it, and for no other."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)
