"""The tokenizer beside a model's weights, as described in ``model.json``."""

from pathlib import Path

from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.errors import UserError
from mc2_hpc.models.weights import TOKENIZER_FILE, ModelCard


def tokenizer_file(folder: Path) -> Path:
    """The sentencepiece file of a checkpoint folder.

    Raises:
        UserError: there is none.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no {TOKENIZER_FILE} beside the weights; copy the run's sentencepiece model there")
    return path


def load_tokenizer(folder: Path, card: ModelCard) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises:
        UserError: there is none, or its style differs from the card's.
    """
    return Tokenizer(tokenizer_file(folder), card.tokenizer_style, card.arch.text.context_length)
