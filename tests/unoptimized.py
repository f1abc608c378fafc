"""`jit` for tests of what is computed and not of how: most of their time is spent on code that runs once.

Digits of float32 and memory are looked at in programs that are compiled as users compile them, by `jax.jit`.
"""

from functools import partial

import jax

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False})
