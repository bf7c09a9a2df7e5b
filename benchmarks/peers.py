"""Other implementations to measure against, with what shims their age demands. `make peers` installs them."""

import importlib
import sys
import types
from importlib.util import find_spec


def fastreid_triplet_loss():
    """fastreid.modeling.losses.triplet_loss.triplet_loss, past packages whose imports are out of date."""
    if 'fastreid' not in sys.modules:
        root = find_spec('fastreid').submodule_search_locations[0]
        for name in ('fastreid', 'fastreid.modeling', 'fastreid.modeling.losses'):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [root + name.removeprefix('fastreid').replace('.', '/')]
    return importlib.import_module('fastreid.modeling.losses.triplet_loss').triplet_loss


def metric_learning_triplet_loss(margin):
    """pytorch-metric-learning's batch-hard miner and triplet loss, Euclidean, mean over anchors."""
    from pytorch_metric_learning import distances, losses, miners, reducers

    euclidean = distances.LpDistance(normalize_embeddings=False, p=2)
    miner = miners.BatchHardMiner(distance=euclidean)
    loss = losses.TripletMarginLoss(margin=margin, distance=euclidean, reducer=reducers.MeanReducer())
    return lambda features, labels: loss(features, labels, miner(features, labels))
