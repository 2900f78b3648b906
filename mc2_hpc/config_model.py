"""The part of a run's configuration that says which model is trained, and how it computes (``mc2_hpc.config`` has the
rest)."""

from dataclasses import dataclass, field

from mc2_hpc.errors import UserError
from mc2_hpc.reading.checks import choose
from mc2_hpc.reading.settings import PathName


@dataclass(frozen=True, kw_only=True)
class VisionOverrides:
    """Vision-tower sizes that differ from the preset's; ``None`` keeps the preset's."""

    image_size: int | None = None
    """Side length of the square input in pixels."""
    patch_size: int | None = None
    width: int | None = None
    layers: int | None = None
    head_width: int | None = None
    mlp_width: int | None = None


@dataclass(frozen=True, kw_only=True)
class TextOverrides:
    """Text-tower sizes that differ from the preset's; ``None`` keeps the preset's."""

    vocab_size: int | None = None
    """Rows of the token table; at least the tokenizer's vocabulary."""
    context_length: int | None = None
    eos_id: int | None = None
    width: int | None = None
    heads: int | None = None
    layers: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which dual encoder, and how its blocks compute."""

    preset: str | None = None
    """A name from ``mc2_hpc.models.presets.PRESETS``; the sizes below override it. Null means the model of
    ``init_from``, or ``ViT-B-32-worldwide``."""
    init_from: PathName | None = None
    """Model whose weights a new run starts from: a run or checkpoint, an open_clip folder or a transformers folder;
    null initialises them randomly from ``seed``."""
    new_tokenizer: bool = False
    """Start from the weights of ``init_from`` even though they were not trained with ``data.tokenizer``."""
    embed_dim: int | None = None
    quick_gelu: bool | None = None
    vision: VisionOverrides = field(default_factory=VisionOverrides)
    text: TextOverrides = field(default_factory=TextOverrides)
    attention: str = "auto"
    """``sdpa`` (torch), ``xformers``, or ``auto`` (the table in ``mc2_hpc.models.layers``)."""
    norm: str = "auto"
    """Layer norms: ``torch``, ``triton`` (one kernel, which reads and writes bf16), ``apex`` (NVIDIA's), or ``auto``
    (triton on a GPU, torch elsewhere and under ``compile``)."""
    activation: str = "auto"
    """Quick-GELU: ``torch``, ``triton`` (one kernel, which keeps only its input), or ``auto`` (as for ``norm``)."""
    recompute: str = field(
        default="none", metadata={"replaces": ("activation_checkpointing", "full for true, none for false")}
    )
    """What the blocks of both towers compute again in the backward pass instead of keeping it: ``none``, ``selective``
    (norms and activations, but no product and no attention) or ``full`` (every block)."""
    patch_dropout: float = 0.0
    """Share of each image's patches that training leaves out, drawn anew in every step."""
    compile: bool = False
    """torch.compile the blocks of both towers."""
    embedding: str = "sharded"
    """The token table: ``sharded`` deals its rows to the ranks, which exchange only those that a batch uses; ``dense``
    leaves it to DeepSpeed with the other parameters. Both train the same model, and checkpoints are the same."""
    text_packing: bool = True
    """Compute only the captions' own tokens, not the padding to the longest caption of a batch; the features are equal
    up to rounding."""

    def __post_init__(self) -> None:
        if self.init_from is not None and not self.init_from.strip():
            raise UserError("model.init_from: is empty; name a model, or null for none")
        choose("model.attention", self.attention, ("auto", "sdpa", "xformers"))
        choose("model.norm", self.norm, ("auto", "torch", "triton", "apex"))
        choose("model.activation", self.activation, ("auto", "torch", "triton"))
        for key in ("norm", "activation"):
            if self.compile and (kernel := getattr(self, key)) not in ("auto", "torch"):
                raise UserError(f"model.{key}={kernel}: torch.compile fuses torch's own; set model.{key}=torch")
        choose("model.recompute", self.recompute, ("none", "selective", "full"))
        if not 0 <= self.patch_dropout < 1:
            raise UserError(f"model.patch_dropout={self.patch_dropout}: must be in [0, 1)")
        choose("model.embedding", self.embedding, ("sharded", "dense"))
