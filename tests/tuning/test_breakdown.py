"""How a step is divided, from profiles whose answer is known."""

import gzip
import json

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.tuning.breakdown import Breakdown, Profile, read_profile, split_step


def write(path, events):
    """A trace of (category, name, first, last) in milliseconds."""
    rows = [{"ph": "X", "cat": c, "name": n, "ts": 1e3 * a, "dur": 1e3 * (b - a)} for c, n, a, b in events]
    with gzip.open(path, "wt") as stream:
        json.dump({"traceEvents": [{"ph": "M", "name": "process_name"}, *rows]}, stream)
    return path


STEPS = [("user_annotation", "step 11", 0, 100), ("user_annotation", "step 12", 100, 200)]


def seconds(found):
    return found.seconds, found.compute, found.network, found.data


def test_a_cpu_step_is_operators_messages_and_gaps(tmp_path):
    events = [
        ("user_annotation", "data wait", 0, 20),
        ("cpu_op", "aten::linear", 20, 80),
        ("cpu_op", "aten::addmm", 25, 75),  # inside the other
        ("cpu_op", "c10d::allreduce_", 80, 81),  # only starts the message
        ("user_annotation", "gloo:all_reduce", 70, 120),  # 10 ms of it are hidden
        ("cpu_op", "aten::add", 150, 260),  # 60 ms after the last step
    ]
    found = read_profile(write(tmp_path / "t.gz", STEPS + events))
    assert not found.on_gpu
    assert seconds(found) == pytest.approx((0.1, 0.055, 0.02, 0.01))


def test_a_gpu_step_is_kernels(tmp_path):
    events = [
        ("cpu_op", "aten::linear", 0, 200),  # launches, which is not computing
        ("kernel", "gemm", 10, 90),
        ("gpu_memcpy", "Memcpy HtoD", 85, 95),
        ("kernel", "ncclDevKernel_AllGather", 80, 130),
        ("user_annotation", "data wait", 130, 160),
    ]
    found = read_profile(write(tmp_path / "t.gz", STEPS + events))
    assert found.on_gpu
    assert seconds(found) == pytest.approx((0.1, 0.0425, 0.0175, 0.015))


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(b"{"), gzip.compress(b'{"traceEvents": []}')],
    ids=["not gzip", "not JSON", "no steps"],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "t.gz").write_bytes(content)
    with pytest.raises(UserError, match="profile|steps"):
        read_profile(tmp_path / "t.gz")


def parts(found):
    return found.data, found.host, found.compute, found.network


def test_the_unprofiled_step_of_a_cpu_is_divided_in_the_profiles_proportions():
    profile = Profile(seconds=0.3, compute=0.1, network=0.05, data=0.1, on_gpu=False)
    found = split_step(0.1, 0.2, profile)
    assert parts(found) == pytest.approx((0.02, 0.02, 0.04, 0.02))
    assert found.seconds == pytest.approx(0.1) and found.limit == "compute"


def test_what_remains_beside_the_kernels_of_a_gpu_is_data_and_host():
    profile = Profile(seconds=0.3, compute=0.04, network=0.01, data=0.0, on_gpu=True)
    assert parts(split_step(0.1, 0.2, profile)) == pytest.approx((0.02, 0.03, 0.04, 0.01))
    # The device was at work while the host waited for data.
    assert parts(split_step(0.06, 0.5, profile)) == pytest.approx((0.01, 0.0, 0.04, 0.01))
    # The profile's steps were slower.
    assert parts(split_step(0.04, 0.5, profile)) == pytest.approx((0.0, 0.0, 0.032, 0.008))


@pytest.mark.parametrize("cause", ["data", "host", "compute", "network"])
def test_the_limit_is_what_takes_longest(cause):
    assert Breakdown(**{**dict.fromkeys(("data", "host", "compute", "network"), 1.0), cause: 2.0}).limit == cause
