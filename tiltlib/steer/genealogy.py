"""Who descends from whom in a run of the loop: lines of descent, surviving ancestors, effective sample sizes."""

from dataclasses import replace

import torch

from tiltlib.chance import effective_sample_size


def lines(trace):
    """For each final particle, the position of its ancestor at every state of a trace: (states, B, K) int64.

    trace: States of one `steer.run(.., trace=True)`, from the start to the end. ValueError: an empty trace.
    """
    if not trace:
        raise ValueError("an empty trace: ask for it with trace=True")
    runs, particles = trace[-1].log_w.shape
    at = [torch.arange(particles, device=trace[-1].log_w.device).expand(runs, -1)]
    for state in trace[:0:-1]:
        at.append(state.ancestors.gather(1, at[-1]))
    return torch.stack(at[::-1])


def survivors(trace):
    """How many particles of each state have a descendant at the end: (states, B), from 1 to K."""
    at = lines(trace).sort(-1).values
    return 1 + (at.diff(dim=-1) != 0).sum(-1)


def along(trace):
    """The positions along the lines of descent: (states, B, K, *shape)."""
    moved = zip(trace, lines(trace), strict=True)
    return torch.stack([state.x[torch.arange(len(at), device=at.device)[:, None], at] for state, at in moved])


def watched(method):
    """(the same Method, a list that a run fills): at every step, the effective sample sizes (B,) before selection.

    A State shows the weights after it. The list grows by steps + 1 entries a run.
    """
    seen = []

    def select(log_w, chance):
        seen.append(effective_sample_size(log_w.flatten(1)))
        return method.select(log_w, chance)

    select.one_child = getattr(method.select, "one_child", False)
    return replace(method, select=select), seen
