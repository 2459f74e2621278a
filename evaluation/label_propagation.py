"""Propagation of the labels of a video's first frame by the similarity of features.

The protocol of Jabri et al., "Space-Time Correspondence as a Contrastive Random Walk", NeurIPS
2020, section 4.1, with its values for DAVIS; DINO (Caron et al., ICCV 2021) has the same with
others. Where the two differ, this takes the first's: a neighbourhood is round, and the first frame
is seen whole. From the second it takes that no frame is twice in the context, however short it is.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.errors import InputError

_TILE = 12  # rows and columns of queries that are worked on together: they share most of their keys
_SIMILARITIES = 1 << 23  # held at once, 32 MiB
_GROUP = 32  # keys of which only the largest similarity is compared at first
_FLAT = 1e-4  # difference of shares in a map that shows no object


@dataclass(frozen=True)
class PropagationConfig:
    """How labels are propagated.

    Attributes:
        top_k: most similar features of the whole context whose labels a feature takes.
        context: latest frames that are looked at, besides the first.
        radius: features of these frames count if closer than this, in features of the map (so 1 is
            the same place only); 0: all do.
        temperature: of the softmax over the top k similarities.
        whole_first_frame: all features of the first frame count, so that an object that was hidden
            is found again; otherwise the radius holds for it, too.
        normalise_channels: stretches each label's upsampled map to [0, 1] before the largest is
            taken (DINO); small objects gain.

    Raises:
        InputError: a value is out of range.
    """

    top_k: int = 10
    context: int = 20
    radius: int = 12
    temperature: float = 0.05
    whole_first_frame: bool = True
    normalise_channels: bool = False

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("context", 0), ("radius", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it is {least} or more")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise InputError(f"temperature is {self.temperature}; it is above 0 and finite")


def propagate(
    features: Iterator[Tensor], first_mask: Tensor, config: PropagationConfig | None = None
) -> Iterator[Tensor]:
    """Labels every frame of a video.

    The mask becomes shares of its ids at the features' resolution; each frame's shares are the
    weighted mean of those of the most similar features of the context; upsampled bilinearly, the
    id with the largest share is the label. Memory holds features and shares of `context` + 1
    frames and some 100 MiB, whatever the length of the video.

    Args:
        features: of each frame in order, [C, h, w], any floating type; they need not be normalised.
        first_mask: ids [H, W] of the first frame, integers; negative ones are ignored: no label.
        config: default: `PropagationConfig()`.

    Yields:
        Ids [H, W] of each frame, of the mask's type, on the features' device; of the first frame
        the given mask.

    Raises:
        InputError: the mask has no id, or (at that frame) features are not finite or change shape.
    """
    if first_mask.ndim != 2 or first_mask.is_floating_point() or not bool((first_mask >= 0).any()):
        raise InputError(
            f"the first frame's mask is {first_mask.dtype} {list(first_mask.shape)} and has no id "
            "of 0 or more; give integer ids [H, W]"
        )
    return _propagate(features, first_mask, config or PropagationConfig())


def _propagate(
    features: Iterator[Tensor], first_mask: Tensor, config: PropagationConfig
) -> Iterator[Tensor]:
    context: _Context | None = None
    for number, frame in enumerate(features):
        queries = _normalised(frame, number)
        if context is None:
            first_mask = first_mask.to(frame.device)
            ids = torch.unique(first_mask[first_mask >= 0])
            context = _Context(queries, _shares(first_mask, ids, queries), config.context)
            yield first_mask
            continue
        if queries.shape != context.features.shape[1:]:
            raise InputError(
                f"the features of frame {number} are {list(queries.shape)} (h, w, C), those of the "
                f"first {list(context.features.shape[1:])}; give all frames of a video one size"
            )
        shares = propagate_shares(queries, context.features, context.shares, config)
        context.append(queries, shares)
        yield ids[_upsampled(shares, first_mask.shape, config).argmax(0)]


class _Context:
    """The first frame and the latest ones, in no order: features and shares of their labels."""

    def __init__(self, features: Tensor, shares: Tensor, latest: int) -> None:
        self._features = features.new_zeros(1 + latest, *features.shape)
        self._shares = shares.new_zeros(1 + latest, *shares.shape)
        self._features[0], self._shares[0] = features, shares
        self._latest, self._appended = latest, 0

    @property
    def features(self) -> Tensor:
        """[n, h, w, C]"""
        return self._features[: 1 + min(self._appended, self._latest)]

    @property
    def shares(self) -> Tensor:
        """[n, h, w, L]"""
        return self._shares[: 1 + min(self._appended, self._latest)]

    def append(self, features: Tensor, shares: Tensor) -> None:
        """Takes a frame in the place of the oldest but the first, if there is no free one."""
        if self._latest:
            place = 1 + self._appended % self._latest
            self._features[place], self._shares[place] = features, shares
            self._appended += 1


@torch.no_grad()
def propagate_shares(
    queries: Tensor, features: Tensor, shares: Tensor, config: PropagationConfig
) -> Tensor:
    """Shares of the labels at every place of a frame, from those of its context.

    Args:
        queries: normalised features [h, w, C] of the frame.
        features: the same [n, h, w, C] of the context, the first frame first.
        shares: of labels [n, h, w, L], there.
        config: top k, radius and temperature.

    Returns:
        [h, w, L].
    """
    height, width = queries.shape[:2]
    found = shares.new_empty(height, width, shares.shape[-1])
    places = torch.arange(features.shape[:3].numel(), device=features.device)
    places = places.view(features.shape[:3])
    for top in range(0, height, _TILE):
        for left in range(0, width, _TILE):
            rows, columns = _clipped(top, _TILE, height), _clipped(left, _TILE, width)
            similarities, nearest = _nearest(queries, rows, columns, features, places, config)
            weights = (similarities / config.temperature).softmax(1)
            taken = shares.flatten(0, 2)[nearest]  # [Q, k, L]
            mean = (weights[:, None] @ taken).squeeze(1)
            found[rows, columns] = mean.view(*found[rows, columns].shape)
    return found


def _nearest(
    queries: Tensor,
    rows: slice,
    columns: slice,
    features: Tensor,
    places: Tensor,
    config: PropagationConfig,
) -> tuple[Tensor, Tensor]:
    """The top k similarities [Q, k] of a tile's queries, and the places [Q, k] of their keys."""
    tile = queries[rows, columns].flatten(0, 1)
    parts: list[tuple[Tensor, Tensor, Tensor | None]] = [(features, places, None)]
    if config.radius > 0:
        reach = config.radius - 1
        height, width = queries.shape[:2]
        key_rows = _clipped(rows.start - reach, rows.stop - rows.start + 2 * reach, height)
        key_columns = _clipped(
            columns.start - reach, columns.stop - columns.start + 2 * reach, width
        )
        window = slice(None), key_rows, key_columns
        round_window = _near(rows, key_rows, columns, key_columns, config.radius, queries.device)
        alone = 1 if config.whole_first_frame else 0
        parts = [
            (features[:alone], places[:alone], None),
            (features[alone:][window], places[alone:][window], round_window),
        ]
    similarities, key_places = [], []
    for keys, places_of_keys, near in parts:
        # as many frames at once as keep the similarities within their bound
        step = max(1, _SIMILARITIES // max(1, len(tile) * keys.shape[1:3].numel()))
        for start in range(0, len(keys), step):
            some = keys[start : start + step].flatten(0, 2)
            found = tile @ some.T
            if near is not None:
                by_frame = found.view(len(tile), -1, near.shape[1])
                by_frame.masked_fill_(~near[:, None], -torch.inf)
            largest, at = _top_k(found, config.top_k)
            similarities.append(largest)
            key_places.append(places_of_keys[start : start + step].flatten()[at])
    largest, at = _top_k(torch.cat(similarities, 1), config.top_k)
    return largest, torch.cat(key_places, 1).gather(1, at)


def _clipped(start: int, count: int, size: int) -> slice:
    return slice(max(0, start), min(size, start + count))


def _near(
    rows: slice,
    key_rows: slice,
    columns: slice,
    key_columns: slice,
    radius: int,
    device: torch.device,
) -> Tensor:
    """Which keys of a window are closer to which queries of a tile than the radius, bool [Q, K]."""

    def squares(of: slice, to: slice) -> Tensor:
        ofs = torch.arange(of.start, of.stop, device=device)
        return (ofs[:, None] - torch.arange(to.start, to.stop, device=device)).square()

    by_row, by_column = squares(rows, key_rows), squares(columns, key_columns)
    distances = by_row[:, None, :, None] + by_column[None, :, None, :]
    return (distances < radius * radius).flatten(2, 3).flatten(0, 1)


def _top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of [Q, N], or all of fewer, and where they are.

    Of long rows, the largest of groups are compared first: the k largest values are in the k groups
    whose largest values are largest. That is several times faster than a sort of all.
    """
    count = values.shape[1]
    groups = count // _GROUP
    if groups < 2 * k:
        top = values.topk(min(k, count), dim=1)
        return top.values, top.indices
    # group g has the values g, g + groups, g + 2 * groups, …
    grouped = values[:, : groups * _GROUP].reshape(len(values), _GROUP, groups)
    best = grouped.amax(1).topk(k, dim=1).indices
    steps = torch.arange(_GROUP, device=values.device) * groups
    among = (best[:, None] + steps[:, None]).flatten(1)
    rest = torch.arange(groups * _GROUP, count, device=values.device)
    among = torch.cat([among, rest.expand(len(values), -1)], 1)
    top = values.gather(1, among).topk(k, dim=1)
    return top.values, among.gather(1, top.indices)


def _normalised(frame: Tensor, number: int) -> Tensor:
    """Features [C, h, w] as unit vectors [h, w, C] of float32."""
    if frame.ndim != 3 or not bool(frame.isfinite().all()):
        raise InputError(
            f"the features of frame {number}, {list(frame.shape)}, are not finite [C, h, w]; check "
            "the network"
        )
    return F.normalize(frame.detach().float().permute(1, 2, 0), dim=2).contiguous()


def _shares(mask: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    """Share of each cell's pixels that has each id: mask [H, W], ids [L], [h, w, L]."""
    one_hot = (mask == ids[:, None, None]).float()
    shares = F.interpolate(one_hot[None], features.shape[:2], mode="area")[0]
    return shares.permute(1, 2, 0).contiguous()


def _upsampled(shares: Tensor, size: torch.Size, config: PropagationConfig) -> Tensor:
    """Shares [h, w, L] at the mask's resolution, [L, H, W]."""
    maps = shares.permute(2, 0, 1)[None]
    maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)[0]
    if not config.normalise_channels:
        return maps
    least, most = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    # a map that is the same everywhere has nothing to stretch but rounding errors
    stretched = (maps - least) / (most - least).clamp_min(_FLAT)
    return torch.where(most - least > _FLAT, stretched, maps)
