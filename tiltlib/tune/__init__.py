"""Tuning: spend gradient steps to move a model to the tilted law. Files are imported when first asked for.

`weighted` holds weights, the exact maximiser and variances (numpy); `training` the rows and the one loop (torch);
`lora` that loop on a causal language model (transformers, peft).
"""

from importlib import import_module

HOMES = {"fit": "tiltlib.tune.lora", "reinforce": "tiltlib.tune.lora", "train": "tiltlib.tune.training"}

__all__ = [*HOMES]


def __getattr__(name):
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(HOMES)}")
    return getattr(import_module(HOMES[name]), name)
