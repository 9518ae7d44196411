"""What gets tilted. A world is imported when first asked for, so that a light one loads nothing that is heavy."""

from importlib import import_module
from typing import NamedTuple

# name -> module that holds it; the literal table is also read by the runner to know what a chapter depends on
HOMES = {
    "Chain": "tiltlib.worlds.chain",
    "Converted": "tiltlib.worlds.converted",
    "Diffusion": "tiltlib.worlds.base",
    "Digits": "tiltlib.worlds.digit_models",
    "Guided": "tiltlib.worlds.guided",
    "Mixture": "tiltlib.worlds.mixture",
    "Product": "tiltlib.worlds.product",
    "Quadratic": "tiltlib.worlds.mixture",
    "Sequence": "tiltlib.worlds.sequence",
    "World": "tiltlib.worlds.base",
    "check": "tiltlib.worlds.checks",
    "classifier": "tiltlib.worlds.digit_models",
    "digits": "tiltlib.worlds.digit_models",
    "flow_digits": "tiltlib.worlds.converted",
    "load_images": "tiltlib.worlds.digit_models",
    "matching": "tiltlib.worlds.converted",
    "rna": "tiltlib.worlds.sequence",
    "language": "tiltlib.worlds.language_model",
}

__all__ = ["Calls", *HOMES]


class Calls(NamedTuple):
    """What a computation has cost, in evaluations; counts add with `plus`.

    model     forward evaluations of the network: one per particle and step, or per token of a language model
    gradient  backward evaluations through the network, in the same unit
    value     evaluations of a value estimate that needs no further model call
    reward    evaluations of the reward, one per sample
    """

    model: int = 0
    gradient: int = 0
    value: int = 0
    reward: int = 0

    def plus(self, **more: int) -> "Calls":
        """These counts and some more, e.g. `calls.plus(model=64)`."""
        return self._replace(**{name: getattr(self, name) + count for name, count in more.items()})


def __getattr__(name):
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; worlds: {', '.join(HOMES)}")
    return getattr(import_module(HOMES[name]), name)


def __dir__():
    return sorted(__all__)
