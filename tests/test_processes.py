"""A loss over two processes: the value of one process, an end in bounded time when one dies, a run that continues."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from marks import needs

pytestmark = pytest.mark.thorough
EXAMPLE = Path(__file__).parent.parent / "examples" / "sharded_head.py"
STEPS = 10
TIMEOUT = 120  # s, for a run from start to end: whatever still runs is killed then
SURVIVAL = 40  # s, twice HEARTBEAT_TIMEOUT + SHUTDOWN_TIMEOUT of the example

for package in ("optax", "orbax.checkpoint", "tqdm"):
    needs(package)


@contextmanager
def _runs(*commands):
    """Runs of the example side by side. After `TIMEOUT`, and at the end of the block, all of them are killed."""
    environment = {**os.environ, "XLA_FLAGS": ""}
    processes = []

    def kill():
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    watch = threading.Timer(TIMEOUT, kill)
    watch.start()
    try:
        for options in commands:
            command = [sys.executable, "-W", "error", str(EXAMPLE), "--smoke", *options]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
        yield processes
    finally:
        watch.cancel()
        kill()
        for process in processes:
            process.communicate()


def _two_processes(*options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    return _runs(*(["--coordinator", coordinator, "--process-id", str(number), *options] for number in range(2)))


def _losses(process):
    """The loss of every step of a run that has to succeed."""
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+) loss (\S+)$", output, re.MULTILINE)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def one_process(directory):
    """The losses of one process with 8 devices, which leaves a checkpoint of step 6 in the directory."""
    with _runs(["--alone", "--steps", str(STEPS), "--checkpoint", str(directory)]) as [process]:
        losses = _losses(process)
    assert list(losses) == list(range(1, STEPS + 1))
    return losses


@pytest.mark.parametrize("across", ["model", "data"])
def test_two_processes_have_the_losses_of_one(across):
    """The example as it is shown: ten steps in one process, and in two that it starts."""
    with _runs(["--across", across]) as [process]:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    table = re.findall(r"^ *(\d+) +(\S+) +(\S+)$", output, re.MULTILINE)
    assert [int(step) for step, *_ in table] == list(range(1, STEPS + 1))
    for _, one, two in table:
        assert float(two) == pytest.approx(float(one), rel=1e-6)
    assert float(table[-1][1]) < float(table[0][1]) - 0.5


@pytest.mark.parametrize(
    ("victim", "signal_number"),
    [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)],
    ids=["the coordinator dies", "the other dies", "the other hangs"],
)
def test_a_process_ends_with_the_other(victim, signal_number):
    """A connection that closes is an error at once; without heartbeats a process counts as dead after 10 s."""
    with _two_processes("--steps", "100000") as processes:
        assert any(line.startswith("step 3 ") for line in processes[victim].stdout), processes[victim].stderr.read()
        processes[victim].send_signal(signal_number)
        survivor = processes[1 - victim]
        _, errors = survivor.communicate(timeout=SURVIVAL)
    assert survivor.returncode != 0
    assert re.search("Gloo .* failed|JAX distributed service detected fatal errors", errors), errors


def test_a_checkpoint_continues_with_the_same_losses(directory, one_process):
    with _runs(["--alone", "--steps", str(STEPS), "--checkpoint", str(directory)]) as [process]:
        losses = _losses(process)
    assert losses == pytest.approx({step: one_process[step] for step in range(7, STEPS + 1)}, rel=1e-6)
