"""Whether the losses in a log fall. Knows no cause."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

LOSS = re.compile(r"""["']loss["']: ["']?(\d{1,9}(?:\.\d{1,20})?(?:e-?\d{1,3})?)\b""")
FEWEST = 12  # logged steps: of fewer a trend is chance
LEAST = 0.02  # of the first loss, that the last one is lower


@dataclass(frozen=True)
class Trend:
    """Mean losses of the first and of the last quarter of the logged steps."""

    first: float
    last: float

    @property
    def falls(self) -> bool:
        """Whether something was learnt; a loss near zero has nowhere to fall."""
        return self.last < self.first * (1 - LEAST) or self.first < LEAST


def loss_trend(lines: Iterable[str]) -> Trend | None:
    """The trend of the losses; None when there are too few."""
    losses = [float(match[1]) for line in lines if (match := LOSS.search(line))]
    if len(losses) < FEWEST:
        return None
    quarter = len(losses) // 4
    return Trend(sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter)
