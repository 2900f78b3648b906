"""DeepSpeed for the two towers: ZeRO stages 0-3 behind one interface, and the state by parameter name.

DeepSpeed partitions the towers but not the scalars outside them (:mod:`mc2_hpc.training.scalars`). With
``model.embedding: sharded`` the token table is not DeepSpeed's either (:mod:`mc2_hpc.training.token_table`), and with
``optim.matrices: muon`` neither are the matrices of the blocks (:mod:`mc2_hpc.training.muon`).
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from mc2_hpc.config import RunConfig
from mc2_hpc.data.normalise import normalise
from mc2_hpc.distributed import Ranks
from mc2_hpc.models.clip import CLIP, Towers
from mc2_hpc.models.float8 import Float8Blocks
from mc2_hpc.models.lora import add_adapters
from mc2_hpc.models.positions import RESIZED
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.precision import Precision
from mc2_hpc.training.clipping import add_to_norm, clip_coefficient, clip_replicated
from mc2_hpc.training.deepspeed_config import deepspeed_config
from mc2_hpc.training.freezing import adapters_of, freeze
from mc2_hpc.training.gradient_scatter import GradientScatter, in_buckets
from mc2_hpc.training.muon import MOMENTUM, MuonMatrices, is_muons
from mc2_hpc.training.optim import parameter_groups, set_learning_rate, tower_optimizer
from mc2_hpc.training.scalars import Scalars
from mc2_hpc.training.token_table import TABLE, TokenTable
from mc2_hpc.training.tower_state import EMA, MOMENTS, TowerState
from mc2_hpc.training.votes import Votes
from mc2_hpc.training.weight_gather import WeightGather, only_in_products


class TrainedTowers(Towers):
    """Both towers on uint8 images and token ids, in the run's precision: the module that DeepSpeed partitions."""

    def __init__(self, clip: CLIP, precision: Precision) -> None:
        super().__init__(clip.vision, clip.text)
        self.precision = precision

    def forward(
        self,
        images: Tensor | None,
        tokens: Tensor | None,
        lengths: Sequence[int] | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(b, 3, S, S) uint8 and (b, L) int64 to two (b, E) unit-length features in fp32, or ``None`` to ``None``;
        stored features of images remain as they are; ``lengths`` and ``kept`` as for the towers."""
        image = text = None
        # Inside the module, because the engine turns off any surrounding autocast that it did not set up itself.
        if images is not None and images.ndim == 2:
            image = images
        elif images is not None:
            with self.precision.autocast(images.device):
                image = self.encode_image(normalise(images, self.precision.dtype), True, kept=kept)
        if tokens is not None:
            with self.precision.autocast(tokens.device):
                text = self.encode_text(tokens, True, lengths=lengths)
        return image, text


class Engine:
    """The model being trained: forward, backward, step, and its full state by parameter name."""

    def __init__(self, clip: CLIP, config: RunConfig, ranks: Ranks, *, num_micro: int) -> None:
        """Take ownership of ``clip`` (whose weights are equal on all ranks), freeze what the config says, and partition
        it.

        Args:
            num_micro: backward passes per step.

        Raises:
            UserError: a tower has fewer blocks than are to be frozen, the optimizer does not run here, or there is
                nothing to compute in fp8.
        """
        os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
        import deepspeed

        deepspeed.logger.setLevel(logging.WARNING)
        if ranks.device.type == "cpu":
            # DeepSpeed would compile an inference operator that nothing here calls. If a process is killed during
            # that, its lock file stays, and every later start waits for it forever.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
        self.stage = config.zero.stage
        self._computes_norm = self.stage in (1, 2) and config.optim.grad_clip == 0
        self._clip = clip
        self._model_config = config.model
        self._adapters = adapters_of(config)
        self._max_norm = config.optim.grad_clip
        self._ema_decay = config.optim.ema_decay
        self._kinds = (*MOMENTS, EMA) if self._ema_decay else MOMENTS
        self.device = ranks.device
        self.num_micro = num_micro
        freeze(clip, config.freeze)
        self.trains_images, self.trains_texts = (
            any(p.requires_grad for p in tower.parameters()) for tower in (clip.vision, clip.text)
        )
        """Whether any parameter of the tower is trained."""
        self._scalars = Scalars(clip, config.optim, self.device)
        self.logit_scale = self._scalars.logit_scale
        self.logit_bias = self._scalars.logit_bias
        """Of the sigmoid loss."""
        self._table = TokenTable(clip, config.optim, ranks) if config.model.embedding == "sharded" else None
        # Without a table that is dealt to the ranks, which would keep all of it in memory.
        self._frozen = [parameter for parameter in clip.parameters() if not parameter.requires_grad]
        precision = Precision(config.precision)
        towers = TrainedTowers(clip, precision).to(self.device)
        self._float8 = (
            Float8Blocks(clip, min_size=config.fp8_min_size, device=self.device) if precision is Precision.FP8 else None
        )
        named = {name: p for name, p in towers.named_parameters() if p.requires_grad}
        self._matrices: MuonMatrices | None = None
        if config.optim.matrices == "muon":
            matrices = {name: named.pop(name) for name in list(named) if is_muons(name)}
            self._matrices = MuonMatrices(matrices, clip.arch, config.optim, ranks)
        num_parameters = sum(parameter.numel() for parameter in named.values())
        rounded = {name: p for name, p in named.items() if only_in_products(name)}
        if config.zero.gather_dtype != "bf16":
            rounded = {}
        scatters = config.zero.reduction == "scatter"
        hides_gather = scatters or bool(rounded)
        groups = in_buckets(
            parameter_groups(named.items(), clip.arch, config.optim),
            largest=config.zero.bucket_elements if hides_gather else None,
            apart=rounded.values(),
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=towers,
            optimizer=tower_optimizer(groups, config.optim, self.device.type),
            config=deepspeed_config(
                config, num_micro=num_micro, num_parameters=num_parameters, on_gpu=self.device.type == "cuda"
            ),
            dist_init_required=False,
        )
        self._parameters = dict(self._engine.module.named_parameters())
        others = {
            name: p for name, p in self._parameters.items() if self._matrices is None or name not in self._matrices
        }
        self._towers = TowerState(self._optimizer, self.stage, others, ema=self._ema_decay > 0, rounded=rounded.keys())
        self._scatter: GradientScatter | None = None
        if scatters:
            self._engine.enable_backward_allreduce = False
            dtype = Precision(config.zero.reduce_dtype).dtype
            self._scatter = GradientScatter(self._optimizer, named, dtype, ranks, every_pass=self.stage == 2)
        self._gather = WeightGather(self._optimizer, towers, named, rounded.values()) if hides_gather else None
        self._trained_table = self._table if self._table is not None and self._table.trained else None
        if self._has_others and self.stage > 0 and not self._computes_norm:
            add_to_norm(self._optimizer, self.stage, self._others)
        if config.model.compile:
            clip.compile_blocks()

    @property
    def _has_others(self) -> bool:
        return self._trained_table is not None or self._matrices is not None

    def _others(self) -> list[Tensor]:
        """The averaged gradients that this rank owns and DeepSpeed does not have, but for the scalars'."""
        rows = [] if self._trained_table is None else [self._trained_table.gradient()]
        return rows if self._matrices is None else [*rows, *self._matrices.gradients()]

    def look_up(self, tokens: Tensor) -> Tensor:
        """Prepare the step of this rank's token ids, (b, L) on the host, and return them on the device. Collective.

        They are those of all the step's micro-batches. On the host, so that their rows of a sharded token table can be
        exchanged without waiting for the device.
        """
        if self._table is not None:
            self._table.look_up(tokens.cpu())
        return tokens.to(self.device, non_blocking=True)

    def features(
        self, images: Tensor, tokens: Tensor, lengths: Sequence[int] | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features of a micro-batch with a graph (see :class:`TrainedTowers`); one :meth:`backward` must follow."""
        return self._engine(images, tokens, lengths, kept)

    @torch.no_grad()
    def features_only(
        self, images: Tensor, tokens: Tensor, lengths: Sequence[int] | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features of a micro-batch without a graph."""
        return self._engine.module(images, tokens, lengths, kept)

    def backward_again(
        self,
        images: Tensor,
        tokens: Tensor,
        lengths: Sequence[int] | None,
        kept: Tensor | None,
        image_grads: Tensor | None,
        text_grads: Tensor | None,
    ) -> None:
        """Encode a micro-batch again, and accumulate the gradients that follow from those of its features.

        Args:
            image_grads, text_grads: (b, E); ``None`` for a tower that is frozen, which is not computed again.
        """
        image, text = self._engine(
            images if image_grads is not None else None, tokens if text_grads is not None else None, lengths, kept
        )
        # The gradients of these inner products are those of the features.
        products = [(f * g).sum() for f, g in ((image, image_grads), (text, text_grads)) if g is not None]
        self.backward(products[0] + products[1] if len(products) == 2 else products[0])

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of ``loss``; the step's last micro-batch averages them over the ranks."""
        last = self._engine.is_gradient_accumulation_boundary()
        if self._scatter is not None:
            self._scatter.begin(last=last)
        self._engine.backward(loss, scale_wrt_gas=False)
        if self._scatter is not None:
            self._scatter.finish(last=last)
        if not last:
            # DeepSpeed counts micro-batches in its step(), which updates nothing before the last.
            self._engine.step()

    def step(self, lr: float, votes: Votes = Votes()) -> tuple[Tensor, Tensor]:  # noqa: B008  # it is a tuple
        """Update all parameters with learning rate ``lr``; clamp ``logit_scale`` to its limits.

        Args:
            votes: this rank's answers to questions that all ranks ask. They share the all-reduce of the scalars'
                gradients, so they need no extra communication.

        Returns:
            The global norm of all averaged gradients but the scalars' before clipping, a 0-d tensor, and the number of
            ranks that said yes to each vote, (len(votes),).
        """
        if self._trained_table is not None:
            self._trained_table.reduce()
        if self._matrices is not None:
            self._matrices.reduce(averaged=self.stage == 0)
        num_scalars = len(self._scalars.trained)
        shared = torch.zeros(num_scalars + len(votes) + 1, device=self.device)
        for number, gradient in enumerate(self._scalars.gradients()):
            shared[number] = gradient
        if self._computes_norm:
            shared[-1] = self._squared_norm()
        for number, vote in enumerate(votes, start=num_scalars):
            if vote:
                shared[number].fill_(1)  # a kernel on the device: a copy from the host would synchronise
        dist.all_reduce(shared)
        set_learning_rate(self._optimizer.param_groups, lr)
        norm = self._step_towers(shared[-1])
        skipped = self.stage > 0 and self._optimizer.overflow  # DeepSpeed skips the update if the norm is not finite
        if self._table is not None:
            if self._trained_table is None or skipped:
                self._table.drop()
            else:
                self._trained_table.step(lr, norm)
        if self._matrices is not None:
            if skipped:
                self._matrices.drop()
            else:
                self._matrices.step(lr, clip_coefficient(norm, self._max_norm) if self._max_norm > 0 else None)
        self._scalars.step(shared[:num_scalars] / dist.get_world_size(), lr)
        if self._ema_decay:
            self._average()
        return norm, shared[num_scalars:-1]

    def _average(self) -> None:
        self._towers.average(self._ema_decay)
        if self._trained_table is not None:
            self._trained_table.average(self._ema_decay)
        if self._matrices is not None:
            self._matrices.average(self._ema_decay)
        self._scalars.average()

    def _squared_norm(self) -> Tensor:
        """The square of the norm of the averaged gradients that this rank owns, 0-d, summed in fp64."""
        owned = [grad for group in self._optimizer.averaged_gradients.values() for grad in group]
        owned += self._others()
        return torch.stack(torch._foreach_norm(owned, 2, torch.float64)).square().sum()

    def _step_towers(self, squared_norm: Tensor) -> Tensor:
        """DeepSpeed's step; returns the global gradient norm, of all but the scale's.

        Args:
            squared_norm: its square, where the engine computes it.
        """
        if self.stage > 0:
            with nullcontext() if self._gather is None else self._gather.instead_of_deepspeeds():
                self._engine.step()
            if self._computes_norm:
                return squared_norm.sqrt()
            return torch.as_tensor(self._engine.get_global_grad_norm())
        # Without ZeRO the engine leaves the averaged gradients on the parameters and computes no norm.
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = clip_replicated(gradients, self._others() if self._has_others else None, self._max_norm)
        self._engine.step()
        return norm

    def state_names(self) -> list[tuple[str, str]]:
        """(kind, parameter name) of every state tensor; kind is ``weight`` or, if the parameter is trained, one of
        :data:`MOMENTS`, :data:`MOMENTUM` if Muon trains it, or, with a moving average of the weights, :data:`EMA`."""
        kinds = {name: self._kinds if name in self._towers.trained else () for name in self._parameters}
        if self._matrices is not None:
            of_matrices = (MOMENTUM, *(kind for kind in self._kinds if kind == EMA))
            kinds |= {name: of_matrices for name in kinds if name in self._matrices}
        kinds |= {name: self._kinds if name in self._scalars.trained else () for name in self._scalars.parameters}
        if self._table is not None:
            kinds[TABLE] = self._kinds if self._table.trained else ()
        return [(kind, name) for name in kinds for kind in ("weight", *kinds[name])]

    def state_shape(self, name: str) -> torch.Size:
        """Full shape of a parameter, partitioned or not."""
        if name in self._scalars.parameters:
            return self._scalars.parameters[name].shape
        if self._table is not None and name == TABLE:
            return self._table.shape
        if self._matrices is not None and name in self._matrices:
            return self._matrices.shape(name)
        return self._towers.shape(name)

    def state(self, receivers: Mapping[tuple[str, str], int] | None = None) -> Iterator[tuple[str, str, Tensor]]:
        """Full state tensors in fp32 on the device, one at a time, in the order of :meth:`state_names`.

        Collective: every rank iterates to the end.

        Args:
            receivers: the rank that needs each tensor. Tensors of a sharded token table are then empty on the others.
        """
        for kind, name in self.state_names():
            to = None if receivers is None else receivers[kind, name]
            yield kind, name, self._full(kind, name, to).detach()

    def _full(self, kind: str, name: str, to: int | None = None) -> Tensor:
        if name in self._scalars.parameters:
            return self._scalars.full(kind, name)
        if self._table is not None and name == TABLE:
            return self._table.full(kind, to)
        if self._matrices is not None and name in self._matrices:
            return self._matrices.full(kind, name)
        self._finish_gather()
        return self._towers.full(kind, name)

    def _finish_gather(self) -> None:
        """Before weights of the towers are read other than by a forward pass. Collective."""
        if self._gather is not None:
            self._gather.finish()

    @contextmanager
    def whole_model(self, *, ema: bool = False) -> Iterator[CLIP]:
        """The model with its full current weights on every rank, without fp8, for reading only. Collective.

        At stage 3 this is an fp32 copy that lives as long as the block; at lower stages, the trained model itself, with
        a copy of the token table if that is sharded over several ranks.

        Args:
            ema: the moving average of the weights, which is a copy at every stage.
        """
        if ema:
            yield self._gathered_copy(EMA)
            return
        self._finish_gather()
        with self._table.whole() if self._table is not None and self.stage < 3 else nullcontext(), self._thawed():
            if self.stage < 3:
                self._scalars.copy_to(self._clip)
            with self._float8.in_bf16() if self._float8 is not None else nullcontext():
                yield self._clip if self.stage < 3 else self._gathered_copy("weight")

    @contextmanager
    def _thawed(self) -> Iterator[None]:
        """Let all parameters require gradients while the context lasts: evaluation takes them of all."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self._frozen:
                parameter.requires_grad_(False)

    def _gathered_copy(self, kind: str) -> CLIP:
        """An fp32 copy of the weights or, where there is one, of another kind of state. Collective."""
        stored = set(self.state_names())
        with torch.device("meta"):
            model = CLIP(self._clip.arch)
            if self._adapters is not None:
                add_adapters(model, self._adapters)
        model = model.to_empty(device=self.device)
        model.set_backends(self._model_config, self.device.type)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self._full(kind if (kind, name) in stored else "weight", name))
        return model

    def load_moments(self, files: TensorFiles, step: int, averages: TensorFiles | None = None) -> None:
        """Restore AdamW's state after ``step`` steps from tensors named ``<parameter>.<moment>``.

        They may have been written by any number of ranks and at any stage. Not collective.

        Args:
            averages: the moving average by parameter name; without it, it begins as the current weights.
        """
        for kind, name in self.state_names():
            if kind == "weight" or (kind == EMA and averages is None):
                continue
            value = averages.get(name) if kind == EMA and averages is not None else files.get(f"{name}.{kind}")
            if name in RESIZED and value.shape != self.state_shape(name):
                if kind != EMA:
                    continue  # the moments of an interpolated table begin at zero again
                value = RESIZED[name](value.float(), self.state_shape(name)[0])
            if name in self._scalars.parameters:
                self._scalars.full(kind, name).copy_(value)
            elif self._table is not None and name == TABLE:
                self._table.load(kind, value)
            elif self._matrices is not None and name in self._matrices:
                self._matrices.load(kind, name, value)
            else:
                self._towers.load(kind, name, value)
        self._towers.resume(step)
        self._scalars.resume(step)
        if self._trained_table is not None:
            self._trained_table.resume(step)

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers."""
        self._engine.destroy()
