"""Training in plain PyTorch: open_clip's losses, torch's AdamW with open_clip's groups and schedule, no engine."""

import math

import torch
from torch import Tensor

from mc2_hpc.config import RunConfig
from mc2_hpc.conversion.peers import import_open_clip
from mc2_hpc.data.normalise import normalise
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import resolve
from tests.training import zero_worker

SCALARS = ("logit_scale", "logit_bias")


def train_plainly(config: RunConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The batches of ``zero_worker`` on one process: the same rows and final weights as its ``train``, in fp64."""
    open_clip = import_open_clip()
    sigmoid = config.loss.kind == "sigmoid"
    model = build_clip(resolve(config.model, logit_bias=sigmoid), seed=0)
    loss_function = open_clip.loss.SigLipLoss() if sigmoid else open_clip.ClipLoss()
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "norm" not in n and "bias" not in n]
    others = [p for p in model.parameters() if not any(p is q for q in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}],
        betas=(0.9, 0.95),
        eps=1e-6,
    )
    rows = []
    for number, (images, tokens) in enumerate(zero_worker.batches()):
        image_features, text_features, scale = model(normalise(images), tokens)
        bias = [model.logit_bias] if model.logit_bias is not None else []
        loss = loss_function(image_features, text_features, scale.exp(), *bias)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for n, p in model.named_parameters() if n not in SCALARS])
        # Warm-up over 5 steps, then cosine decay over the other 15, written out.
        lr = 1e-3 * (number + 1) / 5 if number < 5 else 0.5e-3 * (1 + math.cos(math.pi * (number - 5) / 15))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        rows.append([loss.item(), norm.item(), model.logit_scale.item(), *(b.item() for b in bias)])
    return torch.tensor(rows, dtype=torch.float64), model.state_dict()


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """All weights agree, those aside whose gradient is rounding noise."""
    assert found.keys() == expected.keys()
    for key, plain in expected.items():
        ours = found[key]
        if key.endswith("qkv.bias"):
            # Softmax is invariant to a bias on the keys: its gradient is rounding noise that Adam scales to full steps.
            width = plain.shape[0] // 3
            keep = [*range(width), *range(2 * width, 3 * width)]
            ours, plain = ours[keep], plain[keep]
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")
