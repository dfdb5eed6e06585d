"""What fits where: cheapest first, and hints that hold when they are taken."""

from dataclasses import replace

import pytest
from examples import GOOD, changed

from pipeline.fit import LENGTHS, cheapest_flavor, fit_table, largest_max_length
from pipeline.flavors import FLAVORS
from pipeline.loader import parse_experiment
from pipeline.memory import MemorySpec
from pipeline.models import CATALOGUE
from pipeline.parallel import estimate_memory

GEMMA = CATALOGUE["google/gemma-3-12b-it"]


def experiment_of(text: str = GOOD):
    return parse_experiment(text).experiment


def test_table_is_cheapest_first_and_falls_with_length() -> None:
    table = fit_table(lambda _: MemorySpec(seq=1), GEMMA)
    prices = [fit.flavor.usd_per_hour for fit in table]
    assert prices == sorted(prices)
    for fit in table:
        order = {True: 0, None: 1, False: 2}
        verdicts = [order[fit.verdict(length)] for length in LENGTHS]
        assert verdicts == sorted(verdicts)
        assert all((length <= (fit.largest or 0)) == (fit.verdict(length) is True) for length in LENGTHS)


@pytest.mark.parametrize("name", ["t4-small", "a10g-large", "l40sx1", "a100-large", "h200"])
def test_largest_length_fits_and_the_next_may_not(name: str) -> None:
    flavor = FLAVORS[name]
    largest = largest_max_length(experiment_of(), GEMMA, flavor)
    assert largest is not None and largest % 64 == 0
    for length, fits in ((largest, True), (largest + 64, False)):
        longer = experiment_of(changed("max_length: 2048", f"max_length: {length}"))
        assert (estimate_memory(longer, GEMMA).fits(flavor) is True) is fits


def test_nothing_fits() -> None:
    huge = replace(GEMMA, layers=4800)
    assert largest_max_length(experiment_of(), huge, FLAVORS["t4-small"]) is None
    assert cheapest_flavor(experiment_of(), huge) is None


def test_cheapest_flavor_fits_and_costs_least() -> None:
    for length in (1024, 8192, 32768):
        experiment = experiment_of(changed("max_length: 2048", f"max_length: {length}"))
        found = cheapest_flavor(experiment, GEMMA)
        estimate = estimate_memory(experiment, GEMMA)
        fitting = [f for f in FLAVORS.values() if f.gpus == 1 and estimate.fits(f)]
        assert found is not None
        assert found.usd_per_hour == min(f.usd_per_hour for f in fitting)
