"""What the kernels that count non-matches are given: lists of tensors, each with a name."""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Queries and a tile of the gallery."""
    query: torch.Tensor          # (q, D) float32
    gallery: torch.Tensor        # (n, D) float32
    query_norms: torch.Tensor    # (q,) float64
    gallery_norms: torch.Tensor  # (n,) float64


class FilterTerms(NamedTuple):
    """dots · item_scale + item_shift differs from key · level_scale + level_shift by no more than error."""
    dots: torch.Tensor         # (q, n) float32
    item_scale: torch.Tensor   # (n,) float32
    item_shift: torch.Tensor   # (n,) float32
    level_scale: torch.Tensor  # (q,) float64
    level_shift: torch.Tensor  # (q,) float64
    error: torch.Tensor        # (q,) float64


class Matches(NamedTuple):
    """Query q's true matches are offsets[q]:offsets[q + 1], ascending by (key, item)."""
    offsets: torch.Tensor  # (q + 1,) int64
    keys: torch.Tensor     # (M,) float64
    items: torch.Tensor    # (M,) int64

    def of_queries(self, block):
        return self._replace(offsets=self.offsets[block.start:block.stop + 1])


class Excluded(NamedTuple):
    """What is no non-match of query q: its identity order[begin[q]:end[q]], and junk; ascending."""
    order: torch.Tensor  # (G,) int64
    begin: torch.Tensor  # (q,) int64
    end: torch.Tensor    # (q,) int64
    junk: torch.Tensor   # (J,) int64

    def of_queries(self, block):
        return self._replace(begin=self.begin[block], end=self.end[block])


class Overlaps(NamedTuple):
    """The items that overlap query q's encoding are offsets[q]:offsets[q + 1], ascending, with Jaccard distances."""
    offsets: torch.Tensor  # (q + 1,) int64
    items: torch.Tensor    # (E,) int32
    jaccard: torch.Tensor  # (E,) float64
