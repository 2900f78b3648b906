"""The filters of ``mc2 curate filter`` by the names under which ``--filter`` finds them, such as
``mc2_hpc.filters.Size``. Those of captions alone can be used in ``mc2 curate match`` too.

=================  ========================================================  ==================================
filter             drops                                                     needs
=================  ========================================================  ==================================
Length, Pattern    captions, by length and regular expressions
Languages, Words   captions, by language and lists of words
Size, Aspect       images, by their sides
ClipScore          captions that a CLIP model finds far from their image     a model
OnnxScore          images, by an ONNX model's output                         onnxruntime, a model
DropFaces          images with a face                                        a detector, such as facenet-pytorch
BlurFaces          nothing; it blurs faces                                   the same
=================  ========================================================  ==================================

Models are loaded when the first image is judged.
"""

from mc2_hpc.curation.filters import Length, Pattern
from mc2_hpc.filters.captions import Languages, Words
from mc2_hpc.filters.clip_score import ClipScore
from mc2_hpc.filters.faces import BlurFaces, DropFaces
from mc2_hpc.filters.onnx_score import OnnxScore
from mc2_hpc.filters.shape import Aspect, Size

__all__ = [
    "Aspect",
    "BlurFaces",
    "ClipScore",
    "DropFaces",
    "Languages",
    "Length",
    "OnnxScore",
    "Pattern",
    "Size",
    "Words",
]
