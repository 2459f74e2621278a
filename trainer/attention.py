"""Attention of pixels to a stream of keys: one pass, exact, and never an N×K matrix in memory.

A softmax over all keys needs two things of any part of them: the log-sum-exp of its logits and its
softmax-weighted mean of keys, which is attention with keys as values. Parts merge exactly (Milakov
and Gimelshein, arXiv 1805.02867), so keys may come chunk by chunk, or be attended to on the rank
that holds them. Everything here is pure: tensors in, tensors out, no gradient, no ranks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

NOTHING = -1e30  # the log-sum-exp of no keys; finite, so that merging two of them gives no NaN
_KEYS_A_CALL = 4096  # fewer keys a call cost up to four times as much each
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 26}  # logits held at a time where they are written out
_PROBED = 256  # queries whose hardest key is looked up
_HALF = (torch.bfloat16, torch.float16)


class KeyChunk(NamedTuple):
    """Keys [k, D] and the sample that each comes from, int64 [k]; None is of no sample."""

    keys: Tensor
    sample_ids: Tensor | None = None


@dataclass
class Attended:
    """What N queries found among some keys.

    Attributes:
        mixture: [N, D], softmax-weighted mean of the keys.
        lse: [N], log-sum-exp of the logits.
        hardest: largest logit of the queries of `probed_rows`; NOTHING without keys.
    """

    mixture: Tensor
    lse: Tensor
    hardest: Tensor

    def merge(self, other: "Attended") -> None:
        """Adds other keys, in place."""
        merge_(self.mixture, self.lse, other.mixture, other.lse)
        torch.maximum(self.hardest, other.hardest, out=self.hardest)


KeyPart: TypeAlias = Tensor | KeyChunk | Attended


@torch.no_grad()
def attend_chunks(
    queries: Tensor,
    parts: Iterable[KeyPart],
    scale: float,
    sample_ids: Tensor | None = None,
    precision: torch.dtype | None = None,
) -> Attended:
    """Attention of queries to keys that come in parts, in the order in which they come.

    Args:
        queries: [N, D], float32 or float64.
        parts: keys [k, D] each, keys with sample ids, or what was attended to elsewhere. Every one
            is taken also without queries, since a part may be a collective.
        scale: of the logits, 1 / temperature.
        sample_ids: int64 [N]; a query passes over keys of its own sample. None passes over none.
        precision: of queries and keys in the products, see `attend`.
    """
    probe = probed_rows(len(queries))
    lse = queries.new_full((len(queries),), NOTHING)
    found = Attended(torch.zeros_like(queries), lse, lse[probe].clone())
    own_samples = None if sample_ids is None else torch.unique(sample_ids)
    own_keys: list[KeyChunk] = []
    untouched = True
    for part in _coalesced(parts):
        if isinstance(part, Attended):
            found.merge(part)
            untouched = False
            continue
        if own_samples is not None and part.sample_ids is not None:
            part, own = _split(part, torch.isin(part.sample_ids, own_samples))
            own_keys += [own] if len(own.keys) else []
        if not len(queries) or not len(part.keys):
            continue
        mixture, lse = attend(queries, part.keys, scale, precision)
        if untouched:
            found.mixture, found.lse, untouched = mixture, lse, False  # saves a pass and N×D
        else:
            merge_(found.mixture, found.lse, mixture, lse)
        _probe_(found.hardest, queries[probe], part.keys, scale)
    if own_keys and sample_ids is not None:
        _attend_other_samples(found, queries, sample_ids, _joined(own_keys), scale)
    return found


def probed_rows(num_queries: int) -> slice:
    """Evenly spaced queries, a few hundred at the most, whose largest logit is kept."""
    return slice(0, num_queries, max(1, num_queries // _PROBED))


def attend(
    queries: Tensor, keys: Tensor, scale: float, precision: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax-weighted mean [N, D] of keys [k, D], and log-sum-exp [N], both wide; k ≥ 1.

    Args:
        queries: [N, D], float32 or float64.
        keys: [k, D], any floating type.
        scale: of the logits.
        precision: of the products; sums are float32 or wider. None is float16 for 16-bit keys on a
            GPU, whose flash kernels take nothing wider, and else that of the queries. Components
            of unit vectors lose nothing that bfloat16 would keep, and bfloat16 keeps eight times
            less: up to 2% of the gradient at T = 0.05, where float16 keeps it within 0.3%.
    """
    on_gpu = queries.device.type == "cuda"
    if precision is None:
        precision = torch.float16 if on_gpu and keys.dtype in _HALF else queries.dtype
    narrow, keys = queries.to(precision), keys.to(precision)
    if on_gpu and precision == torch.float64:
        mixture, lse = torch.empty_like(queries), torch.empty_like(queries[:, 0])
        for rows in row_blocks(queries, len(keys)):
            mixture[rows], lse[rows] = attend_except(queries[rows], None, keys, None, scale)
        return mixture, lse
    if on_gpu:
        # the kernels want widths that are multiples of 8
        padding = -queries.shape[1] % 8
        q, k = (F.pad(rows, (0, padding))[None, None] for rows in (narrow, keys))
        if precision in _HALF:
            output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
                q, k, k, 0.0, False, False, scale=scale
            )
        else:
            output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
                q, k, k, None, True, 0.0, False, scale=scale
            )
    else:
        q, k = narrow[None, None], keys[None, None]
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, k, 0.0, False, scale=scale
        )
    mixture = output[0, 0, :, : queries.shape[1]].to(queries.dtype)
    return mixture, lse[0, 0, : len(queries)].to(queries.dtype)


def attend_except(
    queries: Tensor,
    query_labels: Tensor | None,
    keys: Tensor,
    key_labels: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attend` with the logits written out, passing over keys of the query's own label.

    Args:
        queries: [N, D]; N·k logits are held, so take `row_blocks` of them.
        query_labels, key_labels: [N] and [k].
        keys: [k, D].
        scale: of the logits.

    Returns:
        Mean [N, D] and log-sum-exp [N]; NOTHING where no key is left.
    """
    logits = queries @ (keys * scale).T
    if query_labels is not None and key_labels is not None:
        logits.masked_fill_(query_labels[:, None] == key_labels, NOTHING)
    share = logits.softmax(1)
    # the largest share is at least 1/k, so that its logarithm is exact
    return share @ keys, logits.amax(1) - share.amax(1).log()


def merge_(mixture: Tensor, lse: Tensor, other_mixture: Tensor, other_lse: Tensor) -> None:
    """Adds other keys to mixture [N, D] and lse [N], in place."""
    mixture.lerp_(other_mixture, torch.sigmoid(other_lse - lse)[:, None])
    torch.logaddexp(lse, other_lse, out=lse)


def row_blocks(rows: Tensor, num_columns: int) -> Iterator[slice]:
    """Slices of the rows whose logits to `num_columns` vectors are small."""
    size = max(1, _BLOCK.get(rows.device.type, _BLOCK["cuda"]) // max(1, num_columns))
    for first in range(0, len(rows), size):
        yield slice(first, first + size)


def _probe_(hardest: Tensor, queries: Tensor, keys: Tensor, scale: float) -> None:
    """Raises `hardest` [n] to the largest logit of queries [n, D] with keys [k, D], in place."""
    for block in row_blocks(keys, len(queries)):
        logits = queries @ keys[block].to(queries.dtype).T
        torch.maximum(hardest, logits.amax(1) * scale, out=hardest)


def _attend_other_samples(
    found: Attended, queries: Tensor, sample_ids: Tensor, own: KeyChunk, scale: float
) -> None:
    """The few keys of the batch's own samples: each query takes those of the other samples."""
    keys, key_ids = own.keys.to(queries.dtype), own.sample_ids
    for rows in row_blocks(queries, len(keys)):
        mixture, lse = attend_except(queries[rows], sample_ids[rows], keys, key_ids, scale)
        merge_(found.mixture[rows], found.lse[rows], mixture, lse)
    assert key_ids is not None
    probe = probed_rows(len(queries))
    logits = queries[probe] @ keys.T * scale
    logits.masked_fill_(sample_ids[probe][:, None] == key_ids, NOTHING)
    torch.maximum(found.hardest, logits.amax(1), out=found.hardest)


def _coalesced(parts: Iterable[KeyPart]) -> Iterator[KeyChunk | Attended]:
    """Small chunks joined until a call is worth it; large ones pass as they are.

    Those that wait are copied, since a stream may use a chunk's memory again for the one after.
    """
    waiting: list[KeyChunk] = []
    for part in parts:
        if isinstance(part, Attended):
            yield part
            continue
        chunk = KeyChunk(part) if isinstance(part, Tensor) else part
        if not waiting and len(chunk.keys) >= _KEYS_A_CALL:
            yield chunk
            continue
        ids = chunk.sample_ids
        waiting.append(KeyChunk(chunk.keys.clone(), None if ids is None else ids.clone()))
        if sum(len(chunk.keys) for chunk in waiting) >= _KEYS_A_CALL:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(chunks: list[KeyChunk]) -> KeyChunk:
    if len(chunks) == 1:
        return chunks[0]
    if all(chunk.sample_ids is None for chunk in chunks):
        return KeyChunk(torch.cat([chunk.keys for chunk in chunks]))
    ids = [
        torch.full((len(keys),), -1, device=keys.device) if ids is None else ids
        for keys, ids in chunks
    ]
    return KeyChunk(torch.cat([chunk.keys for chunk in chunks]), torch.cat(ids))


def _split(chunk: KeyChunk, chosen: Tensor) -> tuple[KeyChunk, KeyChunk]:
    """The keys that are not chosen [k], and those that are; without a copy where none is."""
    assert chunk.sample_ids is not None
    if not bool(chosen.any()):
        return chunk, KeyChunk(chunk.keys[:0], chunk.sample_ids[:0])
    rest = ~chosen
    return (
        KeyChunk(chunk.keys[rest], chunk.sample_ids[rest]),
        KeyChunk(chunk.keys[chosen], chunk.sample_ids[chosen]),
    )
