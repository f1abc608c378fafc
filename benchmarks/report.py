"""How results are written down: the machine, and tables in Markdown."""

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import jax

PACKAGES = ["jax", "jaxlib", "optax", "torch", "keras", "jax-cce", "tokamax", "numpy", "libtpu", "jax-cuda13-plugin"]
NOT_INSTALLED = "not installed"


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu() -> str:
    """The model's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> str:
    installed = {distribution.name.lower(): distribution.version for distribution in metadata.distributions()}
    found = [f"{name} {installed[name]}" for name in PACKAGES if name in installed]
    return ", ".join([f"Python {platform.python_version()}", *found])


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    release = Path("/etc/os-release")
    system = platform.freedesktop_os_release()["PRETTY_NAME"] if release.exists() else platform.system()
    return f"{cpu()}, cores: {cores()}, {memory:.0f} GiB, {system}; {versions()}"


def accelerator() -> str:
    """Its kind; nothing of a CPU."""
    return "" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind


def device() -> str:
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    size = "" if memory is None else f", {memory / 2**30:.1f} GiB of each for JAX"
    return f"{jax.devices()[0].device_kind}, devices: {jax.device_count()}{size}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(text: str) -> dict[str, list[dict[str, str]]]:
    """The tables of a report by the headings over them, every row by the names of its columns; the last, of several."""
    tables: dict[str, list[dict[str, str]]] = {}
    heading, header = "", []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif cells and header and cells[0] != "---":
            tables[heading].append(dict(zip(header, cells, strict=True)))
        elif cells and not header:
            tables[heading] = []
        header = (header or cells) if cells else []
    return tables


def number(cell: str) -> float | None:
    """What a cell begins with, if that is a number: "1.20", "302.1 MB" or "85 %"; None of a word instead of it."""
    try:
        return float(cell.split()[0])
    except (ValueError, IndexError):
        return None


def in_bytes(count: float) -> str:
    """12345678 → 12.3 MB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
