"""The part of a run's configuration that says what it is trained on (``mc2_hpc.config`` has the rest)."""

from dataclasses import dataclass

from mc2_hpc.errors import UserError
from mc2_hpc.reading.checks import at_least, choose
from mc2_hpc.reading.settings import PathName
from mc2_hpc.train_sources import TrainSource, check_mix


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pairs come from and how they become tensors."""

    train: str | list[str] | list[TrainSource] = ""
    """``.tar`` shards, curated (``.parquet`` beside each) or plain WebDataset: a folder, file, pattern or list
    of these, local or remote (``s3://``, ``gs://``, ``hf://``, ``https://``; table in ``mc2_hpc.data.locations``); or a
    list of sources to mix, each with its own settings (``mc2_hpc.train_sources``)."""
    tokenizer: PathName = ""
    """A sentencepiece model file; if empty, the tokenizer and style that ``model.init_from`` was trained with."""
    tokenizer_style: str = "xlmv"
    """How ids are laid out: ``xlmv`` (fairseq offset; XLM-V, XLM-R), ``mt5`` (SigLIP too) or ``gemma``."""
    balance: PathName | None = None
    """Folder with ``balance.json`` and ``probs/<lang>.npy`` to balance curated shards online; null keeps all."""
    takedown: PathName | None = None
    """A list of samples to leave out, which may grow during a run (``mc2_hpc.data.takedown``)."""
    takedown_seconds: float = 60
    """How often the list is looked at."""
    lanes: int = 256
    """Fixed number of sample streams that the shards are dealt to; must divide the global batch. Ranks own lanes."""
    workers: int = 6
    """Decoding processes per rank; 0 decodes in the training process."""
    prefetch: int = 2
    """Batches each worker holds ready."""
    decode: str = "auto"
    """``turbo`` (DCT-scaled), ``turbo_exact`` (full decode), ``pil``, ``dali`` (on the GPU), or ``auto`` (turbo)."""
    hw_decoder_load: float = 0.65
    """``dali``: share of JPEGs decoded by the GPU's hardware JPEG engine, if it has one; 0 uses CUDA cores only."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Area range of RandomResizedCrop."""
    max_image_pixels: int = 1 << 26
    """Largest image that is decoded at full size. Larger JPEGs, up to eight times as many pixels, are decoded at a half
    or a quarter of their size; any other image that large is skipped."""
    features: PathName | None = None
    """Folder of image features that ``mc2 features`` computes, in place of images; needs ``freeze.vision: all``."""
    seed: int = 0
    """Seeds every random draw of the data path: caption choice, balancing, order, crop, dropped patches."""
    stall_seconds: float = 600
    """Longest wait for samples; after it the run ends with an error that names the rank, worker and shard."""
    cache_dir: PathName | None = None
    """Folder on a local disk for remote shards and for tar indexes that cannot be stored beside their tars; null is the
    user's cache folder."""
    cache_gb: float = 100
    """Most space that remote shards may take there, in 10^9 bytes, over all processes of the machine."""

    @property
    def sources(self) -> list[TrainSource]:
        """The sources to mix; empty if ``train`` only names shards."""
        return [each for each in self.train if isinstance(each, TrainSource)] if isinstance(self.train, list) else []

    def __post_init__(self) -> None:
        check_mix(self.sources)
        if self.sources and self.balance is not None:
            raise UserError("data.balance: data.train lists sources: set balance in those that are to be balanced")
        if self.sources and self.features is not None:
            raise UserError("data.features: data.train lists sources, and features are stored of a single one")
        choose("data.tokenizer_style", self.tokenizer_style, ("xlmv", "mt5", "gemma"))
        choose("data.decode", self.decode, ("auto", "turbo", "turbo_exact", "pil", "dali"))
        if self.features is not None and self.decode == "dali":
            raise UserError("data.features and data.decode=dali: features are of images decoded on the CPU; set turbo")
        at_least("data.takedown_seconds", self.takedown_seconds, 0.01)
        at_least("data.lanes", self.lanes, 1)
        at_least("data.workers", self.workers, 0)
        at_least("data.prefetch", self.prefetch, 1)
        at_least("data.stall_seconds", self.stall_seconds, 1)
        at_least("data.cache_gb", self.cache_gb, 0)
        at_least("data.max_image_pixels", self.max_image_pixels, 1)
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"data.crop_scale=[{low}, {high}]: needs 0 < low <= high <= 1")
        if not 0 <= self.hw_decoder_load <= 1:
            raise UserError(f"data.hw_decoder_load={self.hw_decoder_load}: must be in [0, 1]")
