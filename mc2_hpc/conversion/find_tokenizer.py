"""The sentencepiece model of an open_clip or transformers folder, and the style in which its ids are laid out."""

import logging
from pathlib import Path

from mc2_hpc.conversion.rebuild_tokenizer import rebuild, without_sentinels
from mc2_hpc.conversion.tokenizer_files import MODEL_NAMES
from mc2_hpc.data.tokenizer import MOST_BYTES, STYLES, Tokenizer
from mc2_hpc.errors import UserError
from mc2_hpc.models.weights import TOKENIZER_FILE
from mc2_hpc.reading.files import read_bytes
from mc2_hpc.storage import atomic_path

logger = logging.getLogger(__name__)

_JSON = "tokenizer.json"


def find_tokenizer(folder: Path, eos_id: int, vocab_size: int, out: Path) -> tuple[Path, str]:
    """The sentencepiece file of a folder, and its style.

    If the folder has only a ``tokenizer.json``, the file is rebuilt from it; if the model has no rows for mT5's
    sentinels, they are left out. The file is then ``out / "tokenizer.model"``.

    Raises:
        UserError: there is none, or it does not fit a model with that EOS id and that many embedding rows.
    """
    found = next((folder / name for name in MODEL_NAMES.values() if (folder / name).is_file()), None)
    if found is None:
        found = _rebuilt(folder, out / TOKENIZER_FILE)
    reasons = []
    for style in STYLES:
        try:
            tokenizer = Tokenizer(found, style)
        except UserError as error:
            reasons.append(str(error))
            continue
        fitted = fit_to_rows(tokenizer, vocab_size, out / TOKENIZER_FILE)
        if fitted is None or fitted.eos_id != eos_id:
            raise UserError(
                f"{found}: EOS id {tokenizer.eos_id} and {tokenizer.vocab_size} ids do not fit the model "
                f"(EOS id {eos_id}, {vocab_size} embedding rows); put the model's own tokenizer there"
            )
        return fitted.model_file, style
    raise UserError(reasons[0])


def fit_to_rows(tokenizer: Tokenizer, num_rows: int, copy: Path) -> Tokenizer | None:
    """A tokenizer with at most ``num_rows`` ids: itself, or written to ``copy`` without the sentinels at its end.

    None if it has too many ids that captions can produce.
    """
    if tokenizer.vocab_size <= num_rows:
        return tokenizer
    surplus = tokenizer.vocab_size - num_rows
    shorter = without_sentinels(read_bytes(tokenizer.model_file, most=MOST_BYTES), surplus)
    if tokenizer.style != "mt5" or shorter is None:
        return None
    with atomic_path(copy) as temporary:
        temporary.write_bytes(shorter)
    logger.info("%s: left out its last %d pieces, sentinels without a row in the model", tokenizer.model_file, surplus)
    return Tokenizer(copy, tokenizer.style, tokenizer.context_length)


def _rebuilt(folder: Path, out: Path) -> Path:
    if not (folder / _JSON).is_file():
        raise UserError(
            f"{folder}: no sentencepiece model there ({', '.join(MODEL_NAMES.values())}) and no {_JSON}; "
            f"copy the one that the model was trained with into the folder"
        )
    with atomic_path(out) as temporary:
        temporary.write_bytes(rebuild(folder / _JSON))
    logger.info("%s: sentencepiece model rebuilt from it", folder / _JSON)
    return out
