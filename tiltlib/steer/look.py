"""What the particle loop and the searches beside it see of a particle (prediction, value, gradient), and its cost.

`Eyes` is the only place that calls the network, the value and the reward. It works in chunks, counts calls, and raises
where something is not finite. A particle is looked at in two phases: `worth` finds its value, and its prediction only
if the value reads it; `complete` predicts for those that were selected. So a learned value that needs no prediction
costs no network call on the children that are dropped.
"""

from typing import NamedTuple

import torch


class Look(NamedTuple):
    """Everything computed at n particles; gathered as a whole, so that nothing is left behind at a resampling."""

    prediction: torch.Tensor | None  # of the world; None at i = 0, and between the two phases
    value: torch.Tensor | None  # (n,) float64, in units of the reward; None where the method asks for none
    grad: torch.Tensor | None  # of the value, in the shape that `Kernel.tilt` takes
    proposed: torch.Tensor | None = None  # prediction of the proposal, where it is another world

    def take(self, index):
        """The looks of particles `index`."""
        return Look(*(None if tensor is None else tensor.index_select(0, index) for tensor in self))


class Eyes:
    """Network, value and gradient at particles x (n, *shape) of step i, in chunks of `chunk`; counts what it calls.

    value: a Value, or None where the method asks for none; slope: whether its gradient is wanted, by a backward pass
    through the network unless the value has a `with_gradient` of its own, which returns (value, gradient). condition:
    one for all, or a tensor (runs,), one for each run; particles are laid out run by run.
    """

    def __init__(self, world, reward, value, slope=False, condition=None, chunk=None, proposal=None, runs=1):
        self.world, self.reward, self.value, self.slope = world, reward, value, slope
        self.condition, self.chunk, self.proposal, self.runs = condition, chunk, proposal, runs
        self.early = value is not None and getattr(value, "needs_prediction", True)
        self.own = getattr(value, "with_gradient", None) if slope else None

    def worth(self, x, i, chance, calls):
        """(Look, calls): values and gradients at x, and predictions where the value reads them; the reward at i = 0."""
        n = len(x)
        if i == 0:
            found = Look(None, _join([self._reward(part) for part in x.split(self.chunk or n)]), None)
            calls = calls.plus(reward=n)
        elif self.value is None:
            return Look(None, None, None), calls
        else:
            parts = [self._look(*part, i, chance) for part in self._chunks(x)]
            found = Look(*(_join(each) for each in zip(*parts, strict=True)))
            calls = calls.plus(value=n)
            if self.early:
                calls = self._count(calls, n, gradient=self.slope and self.own is None)
        for what in ("value", "grad"):
            tensor = getattr(found, what)
            if tensor is not None:
                finite(tensor, i, n // self.runs, f"the {'reward' if i == 0 else what}")
        return found, calls

    def complete(self, look, x, i, calls):
        """(Look, calls) with the predictions that a step from i needs, where `worth` had no use for them."""
        if i == 0 or look.prediction is not None:
            return look, calls
        parts = [self._predict(*part, i) for part in self._chunks(x)]
        said, proposed = (_join(each) for each in zip(*parts, strict=True))
        return look._replace(prediction=said, proposed=proposed), self._count(calls, len(x))

    def scattered(self, x, i, chance, calls, who="particle", predict=True):
        """(Look, calls) at particles of different steps i, an integer tensor (n,), predictions included; no gradients.

        The value is the reward where i = 0; the prediction there is zero, or None if all are there. A condition is one
        for all, or (n,). who: what an error calls the n particles. predict: False: none unless the value reads it.
        """
        values, prediction = torch.zeros(len(x), dtype=torch.float64, device=x.device), None
        ends, inside = (i == 0).nonzero()[:, 0], (i > 0).nonzero()[:, 0]
        if len(ends):
            values[ends] = _join([self._reward(part) for part in x[ends].split(self.chunk or len(x))])
        each = isinstance(self.condition, torch.Tensor) and self.condition.ndim
        for here in inside.split(self.chunk or len(x)) if len(inside) else ():
            condition, at = self.condition[here] if each else self.condition, i[here]
            said = self.world.predict(x[here], at, condition) if predict or self.early else None
            if said is not None:
                prediction = said.new_zeros(len(x), *said.shape[1:]) if prediction is None else prediction
                prediction[here] = said
            if self.value is not None:
                values[here] = self.value(self.world, x[here], said, at, condition, chance).double()
        asked = len(inside) if predict or self.early else 0
        calls = self._count(calls.plus(reward=len(ends), value=len(inside) if self.value else 0), asked)
        if not torch.isfinite(values.sum()):
            k = int((~torch.isfinite(values)).nonzero()[0])
            raise ValueError(f"the value is {float(values[k])} at step {int(i[k])}, {who} {k}")
        return Look(prediction, values, None), calls

    def _count(self, calls, n, gradient=False):
        cost = n * getattr(self.world, "cost", 1)
        other = n * getattr(self.proposal, "cost", 1) if self.proposal is not None else 0
        return calls.plus(model=cost + other, gradient=cost if gradient else 0)

    def _chunks(self, x):
        """Parts of x with the condition of each."""
        condition, size = self.condition, self.chunk or len(x)
        if isinstance(condition, torch.Tensor) and condition.ndim:
            each = condition.repeat_interleave(len(x) // self.runs)
            return list(zip(x.split(size), each.split(size), strict=True))
        return [(part, condition) for part in x.split(size)]

    def _reward(self, x):
        return torch.as_tensor(self.reward(x), dtype=torch.float64, device=x.device)

    def _predict(self, x, condition, i):
        return self.world.predict(x, i, condition), self._proposed(x, condition, i)

    def _proposed(self, x, condition, i):
        return None if self.proposal is None else self.proposal.predict(x, i, condition)

    def _look(self, x, condition, i, chance):
        world = self.world
        proposed = self._proposed(x, condition, i) if self.early else None
        if self.own is not None:
            prediction = world.predict(x, i, condition) if self.early else None
            said, grad = self.own(world, x, prediction, i, condition, chance)
            return Look(prediction, said.double(), grad, proposed)
        if self.slope and not x.is_floating_point() and not hasattr(world, "one_hot"):
            return self._table(x, condition, i, chance, proposed)
        with torch.set_grad_enabled(self.slope):
            at = x
            if self.slope:
                at = (x if x.is_floating_point() else world.one_hot(x)).detach().requires_grad_()
            prediction = world.predict(at, i, condition) if self.early else None
            said = self.value(world, at, prediction, i, condition, chance)
            grad = torch.autograd.grad(said.sum(), at)[0] if self.slope else None
        return Look(prediction.detach() if self.early else None, said.detach().double(), grad, proposed)

    def _table(self, x, condition, i, chance, proposed):
        """On a finite world the tilt needs no derivative: the values of all states one step on."""
        world = self.world
        prediction = world.predict(x, i, condition) if self.early else None
        said = self.value(world, x, prediction, i, condition, chance).double()
        every = torch.arange(world.states, device=x.device)
        ahead = world.predict(every, i - 1, condition) if self.early and i > 1 else None
        grad = self.value(world, every, ahead, i - 1, condition, chance).double()
        return Look(prediction, said, grad.expand(len(x), -1), proposed)


def _join(parts):
    """Parts (n, ..) of chunks as one tensor, without copying where there is one; None for parts that are None."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)


def finite(tensor, i, each, what, below=False):
    """Raises ValueError naming run, particle and step where `tensor` (n, ..) is not finite (below: -inf may be)."""
    if torch.isfinite(tensor.sum()):  # one pass; the place is looked for only where it failed
        return
    wrong = ~torch.isfinite(tensor) & ~(tensor.isneginf() & below)
    if wrong.any():
        k = int(wrong.flatten(1).any(1).nonzero()[0] if wrong.ndim > 1 else wrong.nonzero()[0])
        value = tensor.flatten(1)[k][wrong.flatten(1)[k]][0] if tensor.ndim > 1 else tensor[k]
        raise ValueError(f"{what} is {float(value)} at step {i}, run {k // each}, particle {k % each}")
