"""tiltlib: sample, approximate and measure the reward-tilted law p(x) exp(r(x) / beta) / Z."""
