"""Canonical keys, which define the order of the gallery: of single pairs of rows, in float64, by sums of one order."""

from typing import NamedTuple

import torch

from mgn.ops.arguments import PRECISIONS, as_features, choice
from mgn.ops.errors import UserError
from mgn.ops.native import kernels
from mgn.ops.ranking import reference
from mgn.ops.ranking.tiles import OPERANDS, is_readable, on_device, once, rows, spans


class Comparison(NamedTuple):
    """Features on a device that has float64, and how they are compared."""
    query: torch.Tensor    # (Q, D)
    gallery: torch.Tensor  # (G, D), of the query's device or the CPU's
    cosine: bool           # else Euclidean
    precision: str         # of the matrix product

    @property
    def kernels(self):
        return ranking_kernels(self.query.device)

    def of_queries(self, block):
        return self._replace(query=self.query[block])


def compared(query, gallery, metric, precision, streamed=False):
    """The Comparison of what a user passes, checked: detached tensors that fit each other, on a device with float64.

    One array given twice becomes one tensor. `streamed`: the gallery may lie on the CPU while the query does not.
    """
    choice(metric, 'metric', ('cosine', 'euclidean'),
           'pass the matrix of any other distance to match_ranks_from_distance or topk_from_distance')
    choice(precision, 'precision', PRECISIONS, 'it changes the time only')
    is_one = query is gallery
    query = as_features(query, 'query')
    gallery = query if is_one else as_features(gallery, 'gallery')
    if query.shape[1] != gallery.shape[1]:
        raise UserError(f'query and gallery must have rows of one width, not {tuple(query.shape)} and '
                        f'{tuple(gallery.shape)}; take both from one network')
    if query.device != gallery.device and not (streamed and gallery.device.type == 'cpu'):
        raise UserError(f'query and gallery must be on one device, not on {query.device} and {gallery.device}; '
                        'move one with .to()')
    if query.device.type not in ('cpu', 'cuda'):  # mps has no float64, which keys are
        query = query.cpu()
        gallery = query if is_one else gallery.cpu()
    return Comparison(query, gallery, metric == 'cosine', precision)


def ranking_kernels(device):
    """The compiled kernels for tensors of this device, or the references: the same functions, the same bits."""
    return kernels(device) or reference


def finite_norms(features, name):
    """Canonical norms (n,) float64; UserError naming the row where a feature is not finite."""
    norms = torch.empty(len(features), dtype=torch.float64, device=features.device)
    for part in spans(len(features), OPERANDS // max(features.shape[1], 1)):
        ranking_kernels(features.device).canonical_norms(rows(features, part), norms[part])
    if not norms.isfinite().all():  # squares of float32 stay in float64's range
        refuse_not_finite(features, name)
    return norms


def refuse_not_finite(features, name):
    for part in spans(len(features), OPERANDS // features.shape[1]):
        bad_rows = (~features[part].isfinite().all(1)).nonzero()
        if len(bad_rows):
            raise UserError(f'{name} features must be finite, but row {part.start + bad_rows[0].item()} has NaN or '
                            'infinity; look for what made it')


def keys_of_pairs(comparison, queries, items):
    """Canonical keys (P,) float64 of (query queries[p], gallery items[p]); int64 tensors of the query's device.

    Of a gallery in main memory, or of another type, rows that follow each other more than once are read once.
    """
    query, gallery, cosine, _ = comparison
    keys = torch.empty(len(items), dtype=torch.float64, device=query.device)
    if is_readable(query) and is_readable(gallery) and query.device == gallery.device:
        comparison.kernels.canonical_keys(query, gallery, queries, items, cosine, keys)
        return keys
    parts = spans(len(items), once(query.device) // 8 // max(query.shape[1], 1))
    read = [items[part].unique_consecutive(return_inverse=True) for part in parts]
    pieces = on_device(gallery, [once_each.to(gallery.device) for once_each, _ in read], query.device)
    for part, item_rows, (_, numbers) in zip(parts, pieces, read):
        own = torch.arange(len(numbers), device=query.device)
        comparison.kernels.canonical_keys(rows(query, queries[part]), item_rows, own, numbers, cosine, keys[part])
    return keys


def keys_in_order(comparison, queries, items):
    """keys_of_pairs of ascending items. On CPUs an item's queries follow each other, so that its row is read once."""
    query, gallery, cosine, _ = comparison
    if query.device.type != 'cpu' or not is_readable(query) or not is_readable(gallery):
        return keys_of_pairs(comparison, queries, items)
    keys = torch.empty(len(items), dtype=torch.float64)
    comparison.kernels.canonical_keys(gallery, query, items, queries, cosine, keys)
    return keys
