"""Normals that fill space evenly: randomised quasi-Monte Carlo in the place of independent draws."""

import torch
from torch.quasirandom import SobolEngine

from tiltlib.chance import Chance


class Quasi(Chance):
    """A Chance whose `normals` are the points of a freshly scrambled Sobol sequence, one point for each particle.

    Every single point has the right law, whatever came before, so estimates of Z stay unbiased; points of one draw
    repel each other. With particles lined up by position (`order` of a Method) this is sequential quasi-Monte Carlo
    (Gerber and Chopin 2015). Draws of shape (n, m, D) or (n, D): n m points in dimension D. On the CPU.
    """

    def normals(self, shape, dtype=torch.float32, device=None):
        shape = tuple(shape)
        size = shape[-1] if len(shape) > 1 else 1
        seed = int(torch.randint(2**31 - 1, (1,), generator=self.generator))
        count = torch.Size(shape).numel() // max(size, 1)
        points = SobolEngine(size, scramble=True, seed=seed).draw(count, dtype=torch.float64)
        return torch.special.ndtri(points.clamp(2.0**-40, 1 - 2.0**-40)).view(shape).to(dtype)
