"""Traces the real training step of a rank, of any size of model and number of ranks, without computing it.

The product's own :class:`~mc2_hpc.training.engine.Engine`, :class:`~mc2_hpc.training.step.ContrastiveStep`, loss and
DeepSpeed run on fake tensors (:mod:`mc2_hpc.planning.imagined`), and every operator that they dispatch is counted
(:mod:`mc2_hpc.planning.counting`). Two steps are traced and the second is returned, as the first also allocates what
lasts.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mc2_hpc.config import RunConfig
from mc2_hpc.data.lanes import rank_batches
from mc2_hpc.distributed import Ranks
from mc2_hpc.kernels.contrastive import Teacher
from mc2_hpc.models.clip import CLIP, flops_per_pair
from mc2_hpc.models.lora import Adapters, add_adapters
from mc2_hpc.models.presets import ClipArchitecture
from mc2_hpc.planning.captions import Captions
from mc2_hpc.planning.counting import Counting
from mc2_hpc.planning.gpu_kernels import gpu_attention, imagine_triton, loss_backend
from mc2_hpc.planning.imagined import imagined_rank
from mc2_hpc.planning.records import StepTrace
from mc2_hpc.planning.scaling import SCALES
from mc2_hpc.planning.teacher import PlannedFeatures, PlannedTeacher, batch_of, stored_width
from mc2_hpc.precision import Precision
from mc2_hpc.training.engine import Engine
from mc2_hpc.training.freezing import adapters_of, check_adapters, frozen_depths
from mc2_hpc.training.muon import owners, pieces
from mc2_hpc.training.patch_dropout import num_patches
from mc2_hpc.training.step import ContrastiveStep, num_micro_batches
from mc2_hpc.training.votes import Votes


class CountedEngine(Engine):
    """The engine, telling the counter which phase of a step it is in."""

    def __init__(self, clip: CLIP, config: RunConfig, ranks: Ranks, *, num_micro: int, counting: Counting) -> None:
        self._counting = counting
        super().__init__(clip, config, ranks, num_micro=num_micro)
        muon = None if self._matrices is None else self._matrices._optimizer
        if muon is not None:
            muon.register_step_pre_hook(lambda *_: counting.allocations.enter("muon"))
            muon.register_step_post_hook(lambda *_: counting.allocations.enter("update"))

    def look_up(self, tokens: Tensor) -> Tensor:
        with self._counting.phase("look-up"):
            return super().look_up(tokens)

    def features(
        self, images: Tensor, tokens: Tensor, lengths: Sequence[int] | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        with self._counting.phase("forward"):
            return super().features(images, tokens, lengths, kept)

    def features_only(
        self, images: Tensor, tokens: Tensor, lengths: Sequence[int] | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        with self._counting.phase("forward"):
            return super().features_only(images, tokens, lengths, kept)

    def backward_again(
        self,
        images: Tensor,
        tokens: Tensor,
        lengths: Sequence[int] | None,
        kept: Tensor | None,
        image_grads: Tensor | None,
        text_grads: Tensor | None,
    ) -> None:
        with self._counting.phase("forward"):
            super().backward_again(images, tokens, lengths, kept, image_grads, text_grads)

    def backward(self, loss: Tensor) -> None:
        with self._counting.phase("backward"):
            super().backward(loss)

    def step(self, lr: float, votes: Votes = Votes()) -> tuple[Tensor, Tensor]:  # noqa: B008  # it is a tuple
        with self._counting.phase("update"):
            return super().step(lr, votes)

    def muon_shares(self) -> dict[int, float]:
        """The first rank's part of Muon's products on as many ranks as there are, and at each of :data:`SCALES`."""
        if self._matrices is None:
            return {}
        matrices = self._matrices._parameters
        work = {name: sum(_orthogonalised(*each.shape) for each in pieces(name, p)) for name, p in matrices.items()}
        shares = {}
        for size in {dist.get_world_size(), *SCALES}:
            own = sum(work[name] for name, owner in owners(matrices, size).items() if owner == 0)
            shares[size] = own / sum(work.values())
        return shares

    def mark_state(self) -> None:
        """Say what the memory of parameters, gradients and optimizer state is for."""
        mark = self._counting.allocations.mark
        for parameter in self._parameters.values():
            # After DeepSpeed's own hook, which may have moved the gradient to a bucket.
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: mark(_tensors(p.grad), "gradients"))
        # What the following marks leave of these are DeepSpeed's buckets.
        mark(_tensors(vars(self._optimizer)), "communication buffers")
        mark(_tensors([self._towers._inner.state, self._towers._flats]), "optimizer state")
        if (of_scalars := self._scalars._optimizer) is not None:
            mark(_tensors(of_scalars.state), "optimizer state")
        if self._matrices is not None:
            mark(_tensors(self._matrices._state), "optimizer state")
        parameters = [p.data for p in self._parameters.values()]
        parameters += [p.ds_tensor for p in self._parameters.values() if hasattr(p, "ds_tensor")]
        mark([*parameters, *self._scalars.parameters.values()], "parameters")
        if self._table is not None:
            rows = self._table._rows
            mark(_tensors([self._table._state, vars(rows) if rows is not None else ()]), "optimizer state")
            mark((self._table._state["weight"],), "parameters")


def _orthogonalised(rows: int, columns: int) -> int:
    """Multiply-adds in one of Muon's iterations on a matrix: X X^T, its square, and that times X."""
    smaller, larger = sorted((rows, columns))
    return 2 * smaller**2 * larger + smaller**3


def _tensors(value: Any) -> Iterable[Tensor]:
    """Tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


class CountedStep(ContrastiveStep):
    """The step, telling the counter when the loss and its backward pass begin and end."""

    def count(self, counting: Counting) -> None:
        """Set the counter."""
        self._counting = counting

    def _loss(
        self, image_features: Tensor, text_features: Tensor, teacher: Teacher | None
    ) -> tuple[Tensor, Tensor | None]:
        allocations = self._counting.allocations
        with self._counting.phase("loss"):
            loss, divergence = super()._loss(image_features, text_features, teacher)
        around: list[str] = []

        def enter(_: Tensor) -> None:
            around.append(allocations.phase)
            allocations.enter("loss")

        def leave(_: Tensor) -> None:
            if around:
                allocations.enter(around.pop())

        loss.register_hook(enter)
        for features in (image_features, text_features):
            if features.requires_grad:
                features.register_hook(leave)
        return loss, divergence


def trace_step(
    config: RunConfig,
    arch: ClipArchitecture,
    captions: Captions,
    *,
    world_size: int,
    per_node: int,
    device_type: str,
    teacher_arch: ClipArchitecture | None = None,
) -> StepTrace:
    """Trace one step of rank 0.

    Changes global state of torch and DeepSpeed for good: call it in a process of its own
    (:func:`mc2_hpc.planning.processes.in_processes`).

    Args:
        captions: of the ranks.
        per_node: ranks of a node.
        device_type: ``cuda`` for a GPU, ``cpu`` for ranks on CPUs that talk through gloo.
        teacher_arch: of the teacher that the run runs, if it does.

    Raises:
        UserError: the batch does not fit the number of ranks, or a tower is narrower than its adapters.
    """
    num_micro = num_micro_batches(config, world_size)
    check_adapters(arch, config)
    with imagined_rank(device_type, world_size, per_node, captions.answer) as (ranks, counting):
        clip = empty_clip(arch, ranks.device, adapters_of(config))
        parameters = sum(parameter.numel() for parameter in clip.parameters())
        backend = config.loss.backend
        if device_type == "cuda":
            config = imagine_triton(config, counting)
            backend = loss_backend(config)
        _set_backends(clip, config, device_type)
        teacher = _teacher(config, arch, teacher_arch, ranks.device, device_type)
        if isinstance(teacher, PlannedTeacher):
            counting.allocations.mark(teacher.parameters(), "teacher")
        counting.attended = sum(length**2 for length in captions.lengths) / sum(captions.lengths)
        counting.allocations.begin()
        engine = CountedEngine(clip, _with_torch_adamw(config), ranks, num_micro=num_micro, counting=counting)
        engine.mark_state()
        step = counted_step(engine, config, world_size, counting)
        saved = sum(4 * engine.state_shape(name).numel() for _, name in engine.state_names())
        for _ in range(2):
            images, kept = _images(captions, config, arch, ranks.device), _kept(captions, config, arch, ranks.device)
            counting.allocations.see([images] if kept is None else [images, kept])
            batch = batch_of(captions, images, None if teacher is None else teacher.inputs(captions))
            if batch.teacher is not None:
                counting.allocations.mark(batch.teacher.tensors(), "teacher")
            counting.begin()
            taught = None
            if teacher is not None:
                with counting.phase("teacher"):
                    taught = teacher.features(batch, images)
            del batch
            lengths = captions.lengths if packs(config) else None
            step(images, captions.tokens, config.optim.lr, lengths=lengths, kept=kept, teacher=taught)
            before = counting.allocations.by_category()
            del images, kept, taught
        trace = step_trace(
            counting, config, arch, captions, world_size, device_type, before, backend, saved, parameters
        )
        return dataclasses.replace(trace, muon_shares=engine.muon_shares())


def _set_backends(clip: CLIP, config: RunConfig, device_type: str) -> None:
    if device_type != "cuda":
        clip.set_backends(config.model, device_type)
        return
    clip.set_norm(_traceable(config.model.norm), device_type)
    clip.set_activation(config.model.activation, device_type)
    clip.set_recompute(config.model.recompute)
    gpu_attention(clip)


def _teacher(
    config: RunConfig,
    arch: ClipArchitecture,
    teacher_arch: ClipArchitecture | None,
    device: torch.device,
    device_type: str,
) -> PlannedTeacher | PlannedFeatures | None:
    if config.distill is None:
        return None
    if teacher_arch is None:
        return PlannedFeatures(config, stored_width(config, arch), device)
    clip = empty_clip(teacher_arch, device)
    _set_backends(clip, config, device_type)
    return PlannedTeacher(config, arch, clip, device)


def _traceable(norm: str) -> str:
    """Apex's layer norm keeps what Triton's does."""
    return "triton" if norm == "apex" else norm


def _with_torch_adamw(config: RunConfig) -> RunConfig:
    """Every ``optim.backend`` keeps the same state, and passes over it once."""
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, backend="torch"))


def packs(config: RunConfig) -> bool:
    """Whether captions are computed without padding."""
    return config.model.text_packing


def counted_step(engine: Engine, config: RunConfig, world_size: int, counting: Counting) -> CountedStep:
    """The step as the trainer builds it."""
    step = CountedStep(
        engine,
        config.loss,
        feature_dtype=Precision(config.precision).dtype,
        batches=rank_batches(config.global_batch, lanes=config.data.lanes, num_ranks=world_size),
    )
    step.count(counting)
    return step


def step_trace(
    counting: Counting,
    config: RunConfig,
    arch: ClipArchitecture,
    captions: Captions,
    world_size: int,
    device_type: str,
    before: dict[str, int],
    backend: str,
    checkpoint_bytes: int,
    parameters: int,
) -> StepTrace:
    """What was counted since the step began."""
    peak, timeline = counting.allocations.timeline()
    frozen = frozen_depths(arch, config.freeze)
    lengths = captions.lengths if packs(config) else [captions.tokens.shape[1]] * len(captions.lengths)
    patches = num_patches(config, arch)
    adapters = adapters_of(config)
    ranks = {} if adapters is None else dict.fromkeys(adapters.towers, adapters.rank)
    return StepTrace(
        world_size=world_size,
        device=device_type,
        pairs=len(captions.lengths),
        caption_tokens=sum(captions.lengths),
        peak=peak,
        timeline=timeline,
        before=before,
        work=counting.work(),
        collectives=counting.collectives(),
        model_flops=sum(
            flops_per_pair(arch, length, frozen, num_patches=patches, ranks=ranks) * num
            for length, num in Counter(lengths).items()
        ),
        parameters=parameters,
        checkpoint_bytes=checkpoint_bytes,
        loss_backend=backend,
    )


def empty_clip(arch: ClipArchitecture, device: torch.device, adapters: Adapters | None = None) -> CLIP:
    """A model without values: nothing that is counted depends on them."""
    with torch.device("meta"):
        clip = CLIP(arch)
        if adapters is not None:
            add_adapters(clip, adapters)
    for module in clip.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, device=device)))
    return clip


def _images(captions: Captions, config: RunConfig, arch: ClipArchitecture, device: torch.device) -> Tensor:
    """This rank's images on the device, or their stored features."""
    if config.data.features is not None:
        return torch.empty(len(captions.lengths), arch.embed_dim, device=device)
    shape = (len(captions.lengths), 3, arch.vision.image_size, arch.vision.image_size)
    return torch.empty(shape, device=device).to(torch.uint8)


def _kept(captions: Captions, config: RunConfig, arch: ClipArchitecture, device: torch.device) -> Tensor | None:
    """The patches that each of this rank's images keeps; which ones costs the same."""
    if not config.model.patch_dropout:
        return None
    shape = (len(captions.lengths), num_patches(config, arch))
    return torch.zeros(shape, dtype=torch.int64, device=device)
