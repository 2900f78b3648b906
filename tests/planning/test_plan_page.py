"""The page of a plan is self-contained, well formed, and has the numbers of ``--json``."""

import dataclasses

import pytest

from mc2_hpc.pages.numbers import grouped, short_share
from mc2_hpc.planning.page import costs, write_plan_page
from mc2_hpc.planning.records import CATEGORIES, Moment
from tests.planning.test_predict import plan, trace

GIB = 2**30
PHASES = ["look-up", "forward", "forward", "forward", "loss", "backward", "backward", "backward", "update", "update"]


def traced(world_size=16):
    """Rises to 10.5 GiB of activations and falls again."""
    sizes = [min(place, 8 - place) for place in range(9)] + [0]
    moments = [
        Moment(
            operator=100 * place,
            phase=phase,
            by_category=dict.fromkeys(CATEGORIES, 0)
            | {"parameters": 2 * GIB + place, "activations": int((1 + size) * 2.1 * GIB)},
        )
        for place, (phase, size) in enumerate(zip(PHASES, sizes, strict=True))
    ]
    peak = max(moments, key=lambda moment: moment.bytes)
    return dataclasses.replace(trace(world_size), timeline=tuple(moments), peak=peak, before={"parameters": 2 * GIB})


@pytest.fixture
def page(tmp_path, parse_page):
    def make(*plans):
        names = [f"run <{number}>.yaml" for number in range(len(plans))]
        return parse_page(write_plan_page(tmp_path / "plan.html", names, plans).read_text(encoding="utf-8"))

    return make


def test_it_has_the_numbers_of_the_json(page):
    found = plan(trace=traced(), price=2.0)
    values, text = found.to_json(), "".join(page(found).text.split())
    predicted, counted = values["predicted"], values["counted"]

    def check(*parts):
        assert "".join(" ".join(parts).split()) in text, parts

    check(f"{predicted['step_seconds'] * 1e3:,.1f} ms", f"a step, MFU {predicted['mfu']:.0%}")
    check(grouped(predicted["pairs_per_second"]), "pairs per second")
    check(grouped(predicted["gpu_hours"]), "GPU hours", grouped(predicted["money"]), "cost")
    check(f"{counted['peak_bytes'] / GIB:.2f} GiB", "peak memory of a rank, fits")
    for category, size in counted["peak"]["by_category"].items():
        check(category, f"{size / GIB:.2f} GiB {counted['before'].get(category, 0) / GIB:.2f} GiB")
    for kernels, seconds in predicted["compute"].items():
        share = short_share(seconds / predicted["step_seconds"])
        check(kernels, f"{seconds * 1e3:,.1f} ms", share, predicted["limits"][kernels])
    weak, strong = values["scaling"]["weak"], values["scaling"]["strong"]
    for place, point in enumerate(weak):
        check(grouped(point["gpus"]), *(row_of(each) for each in [point, *strong[place : place + 1]]))
    check("at 16 GPUs weakly")
    check("weak: the network takes over at 16")
    for collective in counted["collectives"]:
        check(collective["kind"], "between hosts" if collective["host"] else "", f"{collective['bytes'] / 1e9:,.3f} GB")


def row_of(point):
    return f"{point['seconds'] * 1e3:,.1f} ms {point['exposed'] * 1e3:,.1f} ms {point['pairs_per_second']:,.0f}"


def test_it_needs_nothing_from_elsewhere(page):
    parsed = page(plan(trace=traced()), plan(trace=traced()))
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "img"}
    assert not [value for _, attributes in parsed.tags for value in attributes.values() if value and "http" in value]
    ids = parsed.attributes("id")
    assert len(ids) == len(set(ids)) and "run <1>.yaml" in parsed.text


def test_one_gpu_has_no_scaling(page):
    parsed = page(plan(trace=traced(1)))
    assert "plan with --gpus of at least 2" in " ".join(parsed.text.split())


def test_costs_are_the_whole_step():
    found = plan(trace=traced())
    assert sum(cost.seconds for cost in costs(found)) == pytest.approx(found.step.seconds)
    assert [cost.of_most for cost in costs(found)][0] == 1
