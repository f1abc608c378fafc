"""Prints what JAX says will be its defaults one day, as assignments for `env`."""

import jax

ANNOUNCED = "This will be enabled by default in future versions of JAX"
UNFINISHED = {"jax_scan3"}  # with it JAX 0.12's own `jit` of a `scan` returns zeros, and `grad` of one is not there

for name, (_, _, options) in jax.config.meta.items():
    if ANNOUNCED in str(options.get("help")) and not getattr(jax.config, name) and name not in UNFINISHED:
        print(f"{name.upper()}=1")
