"""The DeepSpeed JSON of a run, generated from its config so that the YAML remains the single source of truth."""

from typing import Any

from mc2_hpc.config import RunConfig


def deepspeed_config(config: RunConfig, *, num_micro: int, num_parameters: int, on_gpu: bool) -> dict[str, Any]:
    """The settings for ``deepspeed.initialize``.

    Args:
        num_micro: backward passes per step.
        num_parameters: trained by DeepSpeed.
    """
    bucket = min(config.zero.bucket_elements, num_parameters)
    # Where gradients are scattered, a stage 1 that reduces nothing remains of DeepSpeed's (GradientScatter).
    scatters = config.zero.reduction == "scatter"
    zero: dict[str, Any] = {"stage": 1 if scatters else config.zero.stage}
    if config.zero.stage in (1, 2):
        # DeepSpeed's norm waits for the device; the engine's own (_squared_norm) does not.
        zero["compute_grad_norm"] = config.optim.grad_clip > 0
        zero |= {
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "contiguous_gradients": not scatters,
            "overlap_comm": on_gpu and config.zero.stage == 2 and not scatters,
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
        "communication_data_type": config.zero.reduce_dtype,
        "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice in every step
        "steps_per_print": 10**9,
    }
