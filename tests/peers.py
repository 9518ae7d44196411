"""Our models as other libraries take them, for comparisons that are optional: nothing in the book needs these."""

import numpy as np
import torch


def feynman_kac(world, reward, beta, lam):
    """A `particles.FeynmanKac` (Chopin) of tempered SMC on a Gaussian world with the posterior-mean value.

    lam: tempering exponent by step i = 0 .. steps, lam[0] = 1. Potentials are written out as ratios, as its users do;
    its random numbers are numpy's global ones.
    """
    import particles

    class Model(particles.FeynmanKac):
        def __init__(self):
            super().__init__(world.steps + 1)

        def clean(self, x, i):
            return world.predict(torch.from_numpy(x).to(world.dtype), i).double().numpy() if i else x

        def twist(self, x, i):
            return lam[i] * np.asarray(reward(torch.from_numpy(self.clean(x, i)))) / beta

        def M0(self, n):
            return np.random.normal(size=(n, world.dim))  # noqa: NPY002

        def M(self, t, xp):
            i = world.steps - t + 1
            mean = float(world.coef.x[i]) * xp + float(world.coef.x0[i]) * self.clean(xp, i)
            return mean + float(world.coef.std[i]) * np.random.normal(size=xp.shape)  # noqa: NPY002

        def logG(self, t, xp, x):
            i = world.steps - t
            return self.twist(x, i) - (self.twist(xp, i + 1) if t else 0.0)

    return Model()
