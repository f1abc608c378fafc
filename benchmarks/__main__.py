"""python -m benchmarks [PART] [--smoke].

PART is all, timings, calls, accuracy, plot, costs, accelerators, post_training or device.
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks import cases, contenders, device_reading, report, timing

RESULTS = Path(__file__).parent / "results"
COMPILED = ["accelerators", "post_training"]  # of no machine
PARTS = ["calls", "timings", "accuracy", "plot"]  # calls before a contender imports checkify


def write(part: str, plan: timing.Plan, smoke: bool, output: Path | None, name: str) -> str:
    """A part's section. What it needs beside JAX is imported when it is asked for."""
    if part == "timings":
        return timing.report(cases.SMOKE if smoke else cases.CASES, plan)
    if part == "calls":
        return timing.report_calls(plan)
    if part == "accuracy":
        from benchmarks import accuracy

        return accuracy.report(plan.contenders, *([1] if smoke else []))
    if part == "plot":
        from benchmarks import plot

        return plot.report(plan, smoke, output, name)
    if part == "costs":
        from benchmarks import costs

        return costs.report(plan, smoke, output, name)
    if part == "device":
        from benchmarks import device

        return device.report(plan.rounds, smoke)
    if part == "post_training":
        from benchmarks import post_training

        return post_training.report(smoke)
    from benchmarks import accelerators

    return accelerators.report(plan.contenders, smoke)


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="jaxce beside others, as tables.")
    parser.add_argument("part", nargs="?", default="all", choices=["all", *PARTS, "costs", *COMPILED, "device"])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and few rounds; writes only to --output")
    parser.add_argument("--rounds", type=int, help="at most so many calls of each contender")
    parser.add_argument("--seconds", type=float, default=60.0, help="no new round of a case after these")
    parser.add_argument("--contenders", nargs="+", choices=list(contenders.CONTENDERS), metavar="NAME")
    parser.add_argument("--output", type=Path, help="folder, benchmarks/results if not given")
    parser.add_argument("--name", help="of the file, the CPU's if not given")
    given = parser.parse_args()

    rounds = given.rounds or (2 if given.smoke else 31)
    plan = timing.Plan(given.contenders or list(contenders.CONTENDERS), rounds, given.seconds)
    name = given.name or slug(f"{report.cpu()} {report.cores()} cores")
    name = name if given.part == "all" else f"{name}-{given.part}"
    if given.part in COMPILED:
        name = given.name or given.part
    output = given.output or (None if given.smoke else RESULTS)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    heading = f"Packages: {report.versions()}." if given.part in COMPILED else f"Machine: {report.machine()}."
    parts = PARTS if given.part == "all" else [given.part]
    sections = [write(part, plan, given.smoke, output, name) for part in parts]
    text = "\n".join([heading + "\n", *sections])
    print(text)
    if given.part == "device":
        name = given.name or slug(report.accelerator()) or name
    if output is not None:
        (output / f"{name}.md").write_text(text)
    if given.part == "device" and not device_reading.passed(text):
        sys.exit(1)


if __name__ == "__main__":
    main()
