"""What rounds say of one machine beside another: in each, both were measured one after the other."""

import math
import statistics
from dataclasses import dataclass

# How often, on each side, the true median may lie outside of what is said to hold it.
MISSED = 0.06


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios of all rounds, and what holds the true median in 88 of 100 cases at least, however the ratios are
    distributed (by order statistics: of 5 rounds the least and the most, of 10 the third from each end; fewer say less)."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, rounds):
        """None of none."""
        if not rounds:
            return None
        rounds = sorted(rounds)
        outside, ways = 0, 2 ** len(rounds)
        while sum(math.comb(len(rounds), count) for count in range(outside + 1)) / ways <= MISSED:
            outside += 1
        first = max(outside - 1, 0)
        return cls(statistics.median(rounds), rounds[first], rounds[-1 - first])

    def is_clear(self, limit):
        """Whether it is known on which side of `limit` it is."""
        return not self.least < limit <= self.most

    def __str__(self):
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"
