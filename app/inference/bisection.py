"""Runs a batch on the models of its requests, and isolates the items that fail."""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from itertools import islice
from typing import TypeVar

from app.errors import DeviceLostError
from app.inference.model import Model
from app.inference.queue import Batch, BatchSlice

Item = TypeVar("Item")
Result = TypeVar("Result")
SliceResult = tuple[BatchSlice[Item, Result], Sequence[Result] | Exception]

logger = logging.getLogger(__name__)


def batch_sizes(largest: int, per_octave: int = 2) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12 and so on up to `largest`: few enough to prepare, dense enough to leave little waiting."""
    sizes = {
        2**k * (per_octave + part) // per_octave for k in range(largest.bit_length()) for part in range(per_octave)
    }
    return sorted({size for size in sizes if size <= largest} | {largest})


def largest_size(sizes: Sequence[int], count: int) -> int:
    """The largest of the ascending sizes that `count` items fill, or the smallest size."""
    return sizes[max(0, bisect_right(sizes, count) - 1)]


def run_by_model(batch: Batch[Item, Result], sizes: Sequence[int], exclusive: bool) -> list[SliceResult[Item, Result]]:
    """The results of all slices, one model after the other.

    Raises DeviceLostError, or what `Model.verify` raises after all items of a model have failed.
    """
    results: list[SliceResult[Item, Result]] = []
    for model in {part.request.model: None for part in batch}:
        own = [part for part in batch if part.request.model is model]
        own_results = _run_with_bisection(model, own, sizes, exclusive)
        if all(isinstance(result, Exception) for _, result in own_results):
            model.verify()
        results += own_results
    return results


def _run_with_bisection(
    model: Model[Item, Result], batch: Batch[Item, Result], sizes: Sequence[int], exclusive: bool
) -> list[SliceResult[Item, Result]]:
    """Each slice's results, or the error of an item that fails on its own. Raises DeviceLostError."""
    items = [item for part in batch for item in part.items]
    try:
        row = iter(_run(model, items, sizes, exclusive))
    except DeviceLostError:
        raise
    except Exception as error:
        if len(items) == 1:
            logger.exception("inference failed for one item")
            return [(batch[0], error)]
        halves = (_run_with_bisection(model, half, sizes, exclusive) for half in _bisect(batch))
        return [result for half in halves for result in half]
    return [(part, list(islice(row, len(part.indices)))) for part in batch]


def _run(model: Model[Item, Result], items: Sequence[Item], sizes: Sequence[int], exclusive: bool) -> list[Result]:
    """One result per item, in calls of the sizes: the whole batch in one, a part of it perhaps in several."""
    results: list[Result] = []
    while len(results) < len(items):
        start = len(results)
        part = items[start : start + largest_size(sizes, len(items) - start)]
        part_results = model(part, exclusive)
        if len(part_results) != len(part):
            raise RuntimeError(f"{len(part_results)} results for {len(part)} items")
        results += part_results
    return results


def _bisect(batch: Batch[Item, Result]) -> tuple[Batch[Item, Result], Batch[Item, Result]]:
    """Two halves: between requests if the batch has several, else within its only request."""
    if len(batch) > 1:
        middle = len(batch) // 2
        return batch[:middle], batch[middle:]
    ((request, indices),) = batch
    middle = len(indices) // 2
    return [BatchSlice(request, indices[:middle])], [BatchSlice(request, indices[middle:])]
