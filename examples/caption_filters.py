"""A custom caption filter: drop advertisements and count each drop under a reason.

    PYTHONPATH=examples mc2 curate match POOL --metadata METADATA --out OUT \\
        --filter caption_filters.NoAdvertisements most_prices=1
"""

import re
from dataclasses import dataclass

import pyarrow as pa

_PRICE = re.compile(r"[$€£¥]\s?\d|\d\s?[$€£¥]")
_CALL = re.compile(r"\b(buy now|free shipping|click here|jetzt kaufen)\b", re.IGNORECASE)


@dataclass(frozen=True)
class NoAdvertisements:
    """Drops captions with more than ``most_prices`` prices, and captions that ask the reader to buy."""

    most_prices: int = 0

    def drop_reasons(self, rows: pa.Table) -> list[str | None]:
        return [self._reason(text) for text in rows["text"].to_pylist()]

    def _reason(self, text: str) -> str | None:
        if len(_PRICE.findall(text)) > self.most_prices:
            return "price"
        return "call_to_buy" if _CALL.search(text) else None
