"""Work spread over processes."""

import os
import time

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.workers import Workers


def later_first(number):
    """The number; small ones take longer."""
    time.sleep(0.2 if number == 0 else 0)
    return number


def refuse(number):
    if number == 3:
        raise UserError("three")
    return number


def die(number):
    os._exit(1)


@pytest.mark.parametrize("number", [1, 2])
def test_results_are_in_order_and_inputs_are_not_read_ahead(number):
    taken = []

    def inputs():
        for item in range(30):
            taken.append(item)
            yield item

    with Workers(number) as workers:
        for done, result in enumerate(workers.map(later_first, inputs())):
            assert result == done
            assert len(taken) <= done + 2 * number
    assert len(taken) == 30


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_of_one_input_is_told_and_the_workers_go_on(number):
    with Workers(number) as workers:
        with pytest.raises(UserError, match="three"):
            list(workers.map(refuse, range(9)))
        assert list(workers.map(refuse, range(3))) == [0, 1, 2]


def test_a_process_that_dies_is_told_and_replaced():
    with Workers(2) as workers:
        with pytest.raises(UserError, match="a worker process died, probably out of memory"):
            list(workers.map(die, range(9)))
        assert list(workers.map(refuse, range(3))) == [0, 1, 2]
