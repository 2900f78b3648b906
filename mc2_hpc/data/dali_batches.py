"""DALI between workers and training: an iterator of batches around an iterator of shares."""

from collections import Counter, deque
from collections.abc import Iterator, Sequence

from mc2_hpc.data.batches import Batch, Samples, Share, batch_of, joined_pixels, joined_samples
from mc2_hpc.data.dali import IN_FLIGHT, DaliDecoder, Jpegs


def decoded_by_dali(steps: Iterator[Sequence[Share]], decoder: DaliDecoder, *, pad_id: int) -> Iterator[Batch]:
    """The batches of ``steps``, with JPEGs decoded by the decoder's pipeline while waiting for the next shares.

    Their images are on the decoder's device; their tokens are pinned if that is a GPU.
    """
    pin = decoder.device.type == "cuda"
    waiting: deque[Samples] = deque()
    for shares in steps:
        decoder.submit(sum(len(share.keys) for share in shares), joined_pixels(shares, pin=pin), _placed(shares))
        waiting.append(joined_samples(shares, pad_id=pad_id, pin=pin))
        if len(waiting) == IN_FLIGHT:
            samples = waiting.popleft()
            images, skipped = decoder.receive()
            yield batch_of(samples, images, skipped=dict(skipped + Counter(samples.skipped)))


def _placed(shares: Sequence[Share]) -> list[tuple[int, Jpegs]]:
    """The JPEGs of each share, with the place of its first sample in the batch."""
    placed, first = [], 0
    for share in shares:
        if share.jpegs is not None:
            placed.append((first, share.jpegs))
        first += len(share.keys)
    return placed
