"""Spends of one, two and three jobs, computed once in the process that imports this; forks of it remember them."""

from fedlora.jobs import Charge
from fedlora.privacy.accounting import epsilon

for jobs in (1, 2, 3):
    epsilon([Charge(noise=1.0, rate=0.5, steps=2)] * jobs, delta=1e-3)
