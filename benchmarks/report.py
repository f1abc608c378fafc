"""How results are written down: the machine, and tables in Markdown."""

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

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


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_bytes(count: float) -> str:
    """12345678 → 12.3 MB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
