"""`jit` for tests of what is computed and not of how: most of their time is spent on code that runs once.

Digits of float32 and memory are looked at in programs that are compiled as users compile them, by `jax.jit`.
"""

from functools import partial

import jax

OPTIONS = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 12):  # later ones have no other emitters
    OPTIONS |= {"xla_cpu_use_fusion_emitters": False}

jit = partial(jax.jit, compiler_options=OPTIONS)
