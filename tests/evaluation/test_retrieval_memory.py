"""Crossmodal-3600's size through the suite's scoring: 3,600 images, two captions each in 36 locales, in 2 GB."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
import torch
import torch.nn.functional as F
from mc2_hpc.evaluation.encoder import ImageFeatures
from mc2_hpc.evaluation.scoring import score
from mc2_hpc.evaluation.tasks import Captions, Retrieval

LOCALES, IMAGES, WIDTH = 36, 3600, 1024
torch.set_num_threads(1)
features = F.normalize(torch.randn(IMAGES, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)
owners = [index // 2 for index in range(2 * IMAGES)]

class Images:
    def __len__(self):
        return IMAGES

class Encoder:
    calls = 0
    def texts(self, texts):
        # Each caption near its image; what a model would have computed.
        self.calls += 1
        noise = torch.randn(len(texts), WIDTH, generator=torch.Generator().manual_seed(self.calls))
        return F.normalize(noise.mul_(0.2).add_(features[owners]), dim=1)

task = Retrieval(
    images=Images(),
    languages={f"l{n:02d}": Captions(texts=[f"{n} {i}" for i in owners], images=owners) for n in range(LOCALES)},
)
encoder = Encoder()
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
found = score(task, ImageFeatures(features, torch.ones(IMAGES, dtype=torch.bool)), encoder)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"growth": peak - resident, "counts": dict(found.counts), "mean": dict(found.mean)}))
"""


@pytest.mark.slow
def test_all_locales_of_xm3600_fit_in_two_gigabytes():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert list(found["counts"].values()) == [7200] * 36
    assert 0 < found["mean"]["text_to_image_R@1"] < found["mean"]["text_to_image_R@10"] <= 1
    assert 0 < found["growth"] < 2e9, found
