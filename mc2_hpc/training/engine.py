"""DeepSpeed for the two towers: ZeRO stages 0-3 behind one interface, and the state by parameter name.

DeepSpeed partitions the towers but not ``logit_scale``: a scalar gains nothing from it, has to stay in fp32 and is
clamped after every step. So each rank keeps an identical copy, updated by the same AdamW with the same gradient. With
``model.embedding: sharded`` the token table is not DeepSpeed's either (:mod:`mc2_hpc.training.token_table`).
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mc2_hpc.config import RunConfig
from mc2_hpc.data.normalise import normalise
from mc2_hpc.distributed import Ranks
from mc2_hpc.models.clip import CLIP, LOGIT_SCALE_MAX, Towers
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.precision import Precision
from mc2_hpc.training.clipping import add_to_norm, clip_replicated
from mc2_hpc.training.optim import adamw, parameter_groups
from mc2_hpc.training.token_table import TABLE, TokenTable
from mc2_hpc.training.votes import Votes

MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainedTowers(Towers):
    """Both towers on uint8 images and token ids, in the run's precision: the module that DeepSpeed partitions."""

    def __init__(self, clip: CLIP, precision: Precision) -> None:
        super().__init__(clip.vision, clip.text)
        self.precision = precision

    def forward(self, images: Tensor, tokens: Tensor, lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """(b, 3, S, S) uint8 and (b, L) int64 to two (b, E) unit-length features in fp32; ``lengths`` as for the text
        tower."""
        # Inside the module, because the engine turns off any surrounding autocast that it did not set up itself.
        with self.precision.autocast(images.device):
            return self.encode_pairs(normalise(images, self.precision.dtype), tokens, lengths)


def deepspeed_config(config: RunConfig, *, num_micro: int, num_parameters: int, on_gpu: bool) -> dict[str, Any]:
    """The DeepSpeed JSON of a run, generated so that the YAML remains the single source of truth."""
    bucket = min(config.zero.bucket_elements, num_parameters)
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.stage in (1, 2):
        # DeepSpeed's norm waits for the device; the engine's own (_squared_norm) does not.
        zero["compute_grad_norm"] = config.optim.grad_clip > 0
        zero |= {
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "contiguous_gradients": True,
            "overlap_comm": on_gpu and config.zero.stage == 2,
        }
    elif config.zero.stage == 3:
        zero |= {
            "reduce_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket // 10,
            "stage3_param_persistence_threshold": config.zero.persist_below_elements,
            "overlap_comm": on_gpu,
        }
    return {
        # Only the number of micro-batches matters here; the loss is already the mean over the global batch.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_micro,
        # At stage 0 the engine clips, because DeepSpeed's norm would lack a sharded token table.
        "gradient_clipping": config.optim.grad_clip if config.zero.stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice in every step
        "steps_per_print": 10**9,
    }


class Engine:
    """The model being trained: forward, backward, step, and its full state by parameter name."""

    def __init__(self, clip: CLIP, config: RunConfig, ranks: Ranks, *, num_micro: int) -> None:
        """Take ownership of ``clip`` (whose weights are equal on all ranks) and partition it.

        Args:
            num_micro: backward passes per step.
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
        self._max_norm = config.optim.grad_clip
        self.device = ranks.device
        self.num_micro = num_micro
        self.logit_scale = nn.Parameter(clip.logit_scale.detach().to(self.device, torch.float32, copy=True))
        self._scale_optimizer = adamw(parameter_groups([("logit_scale", self.logit_scale)], config.optim), config.optim)
        self._table = TokenTable(clip.text, config.optim, ranks) if config.model.embedding == "sharded" else None
        towers = TrainedTowers(clip, Precision(config.precision)).to(self.device)
        num_parameters = sum(p.numel() for p in towers.parameters())
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=towers,
            optimizer=adamw(parameter_groups(towers.named_parameters(), config.optim), config.optim),
            config=deepspeed_config(
                config, num_micro=num_micro, num_parameters=num_parameters, on_gpu=self.device.type == "cuda"
            ),
            dist_init_required=False,
        )
        self._parameters = dict(self._engine.module.named_parameters())
        self._moment_owners = self._create_moments()
        if self._table is not None and self.stage > 0 and not self._computes_norm:
            add_to_norm(self._optimizer, self.stage, self._table.gradient)
        if config.model.compile:
            clip.compile_blocks()

    def look_up(self, tokens: Tensor) -> Tensor:
        """Prepare the step of this rank's token ids, (b, L) on the host, and return them on the device. Collective.

        They are those of all the step's micro-batches. On the host, so that their rows of a sharded token table can be
        exchanged without waiting for the device.
        """
        if self._table is not None:
            self._table.look_up(tokens.cpu())
        return tokens.to(self.device, non_blocking=True)

    def features(self, images: Tensor, tokens: Tensor, lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Features of a micro-batch with a graph (see :class:`TrainedTowers`); one :meth:`backward` must follow."""
        return self._engine(images, tokens, lengths)

    @torch.no_grad()
    def features_only(
        self, images: Tensor, tokens: Tensor, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features of a micro-batch without a graph."""
        return self._engine.module(images, tokens, lengths)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of ``loss``; the step's last micro-batch averages them over the ranks."""
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            # DeepSpeed counts micro-batches in its step(), which updates nothing before the last.
            self._engine.step()

    def step(self, lr: float, votes: Votes = Votes()) -> tuple[Tensor, Tensor]:  # noqa: B008  # it is a tuple
        """Update all parameters with learning rate ``lr``; clamp ``logit_scale`` to [0, ln 100].

        Args:
            votes: this rank's answers to questions that all ranks ask. They share the all-reduce of the scale's
                gradient, so they need no extra communication.

        Returns:
            The global norm of all averaged gradients but the scale's before clipping, a 0-d tensor, and the number of
            ranks that said yes to each vote, (len(votes),).
        """
        if self._table is not None:
            self._table.reduce()
        assert self.logit_scale.grad is not None
        shared = torch.zeros(2 + len(votes), device=self.device)
        shared[0] = self.logit_scale.grad
        if self._computes_norm:
            shared[-1] = self._squared_norm()
        for number, vote in enumerate(votes, start=1):
            if vote:
                shared[number].fill_(1)  # a kernel on the device: a copy from the host would synchronise
        dist.all_reduce(shared)
        self.logit_scale.grad.copy_(shared[0] / dist.get_world_size())
        for group in (*self._optimizer.param_groups, *self._scale_optimizer.param_groups):
            group["lr"] = lr
        norm = self._step_towers(shared[-1])
        if self._table is not None:
            if self.stage > 0 and self._optimizer.overflow:
                self._table.drop()  # DeepSpeed skips the update if the norm is not finite
            else:
                self._table.step(lr, norm)
        self._scale_optimizer.step()
        self._scale_optimizer.zero_grad()
        with torch.no_grad():
            self.logit_scale.clamp_(0, LOGIT_SCALE_MAX)
        return norm, shared[1:-1]

    def _squared_norm(self) -> Tensor:
        """The square of the norm of the averaged gradients that this rank owns, 0-d, summed in fp64."""
        owned = [grad for group in self._optimizer.averaged_gradients.values() for grad in group]
        if self._table is not None:
            owned.append(self._table.gradient())
        return torch.stack(torch._foreach_norm(owned, 2, torch.float64)).square().sum()

    def _step_towers(self, squared_norm: Tensor) -> Tensor:
        """DeepSpeed's step; returns the global gradient norm, which includes a sharded table's gradient.

        Args:
            squared_norm: its square, where the engine computes it.
        """
        if self.stage > 0:
            self._engine.step()
            if self._computes_norm:
                return squared_norm.sqrt()
            return torch.as_tensor(self._engine.get_global_grad_norm())
        # Without ZeRO the engine leaves the averaged gradients on the parameters and computes no norm.
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        rows = None if self._table is None else self._table.gradient()
        norm = clip_replicated(gradients, rows, self._max_norm)
        self._engine.step()
        return norm

    def state_names(self) -> list[tuple[str, str]]:
        """(kind, parameter name) of every state tensor; kind is ``weight`` or one of :data:`MOMENTS`."""
        names = [*self._parameters, "logit_scale", *([TABLE] if self._table is not None else [])]
        return [(kind, name) for name in names for kind in ("weight", *MOMENTS)]

    def state_shape(self, name: str) -> torch.Size:
        """Full shape of a parameter, partitioned or not."""
        if name == "logit_scale":
            return self.logit_scale.shape
        if self._table is not None and name == TABLE:
            return self._table.shape
        parameter = self._parameters[name]
        return getattr(parameter, "ds_shape", parameter.shape)

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
        if name == "logit_scale":
            return self.logit_scale if kind == "weight" else self._scale_optimizer.state[self.logit_scale][kind]
        if self._table is not None and name == TABLE:
            return self._table.full(kind, to)
        return self._tower_state(self._parameters[name], kind)

    def _tower_state(self, parameter: nn.Parameter, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.stage == 0:
            return parameter if kind == "weight" else self._optimizer.state[parameter][kind]
        if kind != "weight":
            return safe_get_full_optimizer_state(parameter, kind)
        # Below stage 3 every rank holds the full fp32 parameter, which equals the master copy.
        return safe_get_full_fp32_param(parameter) if self.stage == 3 else parameter

    @contextmanager
    def whole_model(self) -> Iterator[CLIP]:
        """The model with its full current weights on every rank, for reading only. Collective.

        At stage 3 this is an fp32 copy that lives as long as the block; at lower stages, the trained model itself, with
        a copy of the token table if that is sharded over several ranks.
        """
        with self._table.whole() if self._table is not None and self.stage < 3 else nullcontext():
            model = self._clip if self.stage < 3 else self._gathered_copy()
            with torch.no_grad():
                model.logit_scale.copy_(self.logit_scale)
            yield model

    def _gathered_copy(self) -> CLIP:
        with torch.device("meta"):
            model = CLIP(self._clip.arch)
        model = model.to_empty(device=self.device)
        model.set_backends(self._model_config, self.device.type)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self._full("weight", name))
        return model

    def load_moments(self, files: TensorFiles, step: int) -> None:
        """Restore AdamW's state after ``step`` steps from tensors named ``<parameter>.<moment>``.

        They may have been written by any number of ranks and at any stage. Not collective.
        """
        for optimizer in self._moment_owners:
            for state in optimizer.state.values():
                state["step"].fill_(step)
        for kind in MOMENTS:
            self._scale_optimizer.state[self.logit_scale][kind].copy_(files.get(f"logit_scale.{kind}"))
            for name, parameter in self._parameters.items():
                self._set_moment(parameter, kind, files.get(f"{name}.{kind}"))
            if self._table is not None:
                self._table.load_moment(kind, files.get(f"{TABLE}.{kind}"))
        if self._table is not None:
            self._table.resume(step)

    def _set_moment(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 0:
            self._optimizer.state[parameter][kind].copy_(value)
        elif self.stage == 3:
            # Every rank holds a piece of equal size, the last ones padded; the full-tensor setter ignores the padding.
            piece = torch.zeros(getattr(parameter, "ds_tensor").numel(), device=self.device)  # noqa: B009  # DeepSpeed's
            start = dist.get_rank() * piece.numel()
            mine = value.flatten()[start : start + piece.numel()]
            piece[: mine.numel()] = mine
            safe_set_local_optimizer_state(parameter, piece, kind)
        else:
            safe_set_full_optimizer_state(parameter, value.to(self.device), kind)

    def _create_moments(self) -> list[torch.optim.Optimizer]:
        """Allocate what AdamW would allocate in its first step, filled with zeros.

        This makes memory run out at the start or not at all, gives a checkpoint something to fill, and lets DeepSpeed
        link every parameter to its state. On its own, DeepSpeed links all parameter groups after it has stepped the
        first, when the others have no state yet. It steps flat partitions in place of the parameters and has no public
        way to do this, hence the attribute names of its optimizers here (0.19).

        Returns the optimizers that own the state.
        """
        inner, flats = self._optimizer, list(self._parameters.values())
        if self.stage in (1, 2):
            inner, flats = self._optimizer.optimizer, self._optimizer.single_partition_of_fp32_groups
        elif self.stage == 3:
            inner, flats = self._optimizer.optimizer, self._optimizer.fp32_partitioned_groups_flat
        for optimizer, tensors in ((inner, flats), (self._scale_optimizer, [self.logit_scale])):
            for tensor in tensors:
                optimizer.state[tensor] = {
                    # Fused AdamW counts steps on the device, in fp32.
                    "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                    **{kind: torch.zeros_like(tensor) for kind in MOMENTS},
                }
        if self.stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()
        return [inner, self._scale_optimizer]

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers."""
        self._engine.destroy()
