"""What a TPU v5e and an H100 would hold and do, as their compilers say: compiled, not timed.

Needs the packages of the extra `accelerators`, and no accelerator. A device whose compiler is not installed is left
out, and so is a contender that is not.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from jax.sharding import PartitionSpec
from tqdm import tqdm

from benchmarks.cases import CITY, OPTIONS, Case, tiny
from benchmarks.compiled import compile_step, h100, mesh_of, temporaries, v5e
from benchmarks.contenders import JAX_LOSSES, shapes_for
from benchmarks.report import in_bytes, table

DEVICES: dict[str, Callable[[], Any]] = {"TPU v5e": v5e, "H100": h100}

CASES = [
    replace(case, dtype="bfloat16")
    for case in [
        Case("ImageNet-1k", (8192, 1000)),
        Case("ImageNet-21k", (8192, 21841)),
        Case("Cityscapes", (8, 19, 512, 1024), **CITY),
        Case("GPT-2", (8192, 50257)),
        Case("GPT-2", (8192, 50257), **OPTIONS),
        Case("GPT-2", (8192, 50257), kind="distributions"),
        Case("Llama-3", (8192, 128256)),
        Case("GPT-2 head", (8192, 50257), features=768),
        Case("GPT-2 head", (8192, 50257), features=768, **OPTIONS),
        Case("Llama-3 head", (8192, 128256), features=4096),
        Case("Gemma-2 head", (8192, 256000), features=2304, softcap=30.0),
    ]
]


def cells(topology: Any, case: Case, loss: Any, inputs: list[jax.ShapeDtypeStruct]) -> list[str]:
    """Temporaries, flops and bytes accessed of value and gradients on one device."""
    try:
        step = compile_step(mesh_of(topology, {"x": 1}), loss, inputs, [PartitionSpec()] * len(inputs), case.argnums)
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return ["does not fit", "–", "–"]
        raise
    cost = step.cost_analysis() or {}
    counts = [f"{cost[key] / 1e9:.1f} G" if key in cost else "–" for key in ("flops", "bytes accessed")]
    return [in_bytes(temporaries(step)), *counts]


def rows_of(device: str, topology: Any, cases: list[Case], contenders: list[str]):
    for case in tqdm(cases, desc=device):
        for contender in contenders:
            try:
                loss = JAX_LOSSES[contender](case)
            except ImportError:
                continue
            if loss is not None:
                yield [device, str(case), contender, *cells(topology, case, loss, shapes_for(contender, case))]


def report(contenders: list[str], smoke: bool) -> str:
    jax.config.update("jax_platforms", "cpu")  # no search for the devices themselves
    rows, missing = [], []
    cases = [tiny(CASES[3]), tiny(CASES[7])] if smoke else CASES
    contenders = [contender for contender in contenders if contender in JAX_LOSSES]
    for device, topology_of in DEVICES.items():
        try:
            topology = topology_of()
        except (RuntimeError, ValueError) as error:  # no such platform
            missing.append(f"\n{device}: no compiler is installed ({type(error).__name__}).\n")
            continue
        rows += rows_of(device, topology, cases, contenders)
    return f"""## Compiled, not timed

Value and gradients of the mean loss, compiled for one device and not run. Temporaries are what the program holds beside
arguments and results. Flops and bytes accessed are XLA's estimate, which counts the body of a loop once: a linear head
in blocks does as many times more as it has blocks. “–”: the compiler does not say.

{table(["device", "case", "contender", "temporaries", "flops", "bytes accessed"], rows)}
{"".join(missing)}"""
