"""Other implementations to measure against, with what shims their age demands. `make peers` installs them."""

import importlib
import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from importlib.util import find_spec


def without_init(*names):
    """Makes the packages importable without running their __init__, whose imports are out of date.

    Packages of the same root that an earlier call made so, and this call does not name, are imported whole again.
    """
    imported = sys.modules.get(names[0])
    root = imported.__path__[0] if imported else find_spec(names[0]).submodule_search_locations[0]
    for name, module in [*sys.modules.items()]:
        if name.startswith(f'{names[0]}.') and name not in names and hasattr(module, 'without_init'):
            del sys.modules[name]
    for name in names:
        if name not in sys.modules:
            module = sys.modules[name] = types.ModuleType(name)
            module.__spec__ = ModuleSpec(name, None, is_package=True)
            module.__path__ = [root + name.removeprefix(names[0]).replace('.', '/')]
            module.without_init = True


def fastreid_triplet_loss():
    """fastreid.modeling.losses.triplet_loss.triplet_loss."""
    without_init('fastreid', 'fastreid.modeling', 'fastreid.modeling.losses')
    return importlib.import_module('fastreid.modeling.losses.triplet_loss').triplet_loss


def fastreid_loader(size, is_train=True):
    """paths → (B, 3, H, W) float32 by fast-reid's read_image, transforms as projects/MGN sets them, and normalisation.

    Images are stacked by torch: its own collator imports what torch no longer has, and would fill with zeros and add.
    """
    import torch

    without_init('fastreid', 'fastreid.data')
    cfg = importlib.import_module('fastreid.config.defaults')._C.clone()
    cfg.INPUT.SIZE_TRAIN = cfg.INPUT.SIZE_TEST = list(size)
    cfg.INPUT.FLIP.ENABLED = cfg.INPUT.PADDING.ENABLED = cfg.INPUT.REA.ENABLED = True
    transforms = importlib.import_module('fastreid.data.transforms').build_transforms(cfg, is_train)
    read_image = importlib.import_module('fastreid.data.data_utils').read_image
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    return lambda paths: torch.stack([transforms(read_image(path)) for path in paths]).sub_(mean).div_(std)


def fastreid_evaluate_rank(use_cython=True):
    """fastreid.evaluation.rank's evaluate_cy, compiled on first use, or evaluate_py: (distmat, pids and camids,
    max_rank=50)."""
    import numpy as np
    import pyximport

    without_init('fastreid', 'fastreid.evaluation')
    before = sys.meta_path[:]
    pyximport.install(setup_args={'include_dirs': np.get_include()}, language_level=3)
    try:
        rank = importlib.import_module('fastreid.evaluation.rank')
    finally:
        sys.meta_path[:] = before
    assert rank.IS_CYTHON_AVAI, 'fast-reid\'s ranking must be compiled, but is not; look at what pyximport printed'
    return lambda *args, max_rank=50: (rank.evaluate_cy if use_cython else rank.evaluate_py)(*args, max_rank, False)


def torch_products(device):
    """{name: (q, g) → q @ gᵀ in float32}: torch.mm, which takes MKL on CPUs, and there oneDNN, under a private name."""
    import torch

    products = {'mm': lambda q, g: torch.mm(q, g.T)}
    if device.type == 'cpu' and torch.backends.mkldnn.is_available():
        products['oneDNN'] = lambda q, g: torch.ops.mkldnn._linear_pointwise(q, g, None, 'none', [], '')
    return products


def fastreid_mgn(num_classes, device='cpu'):
    """fastreid.modeling.meta_arch.mgn.MGN, its optimizer and what this wraps the parameters in, both as its trainer
    builds them.

    Without pretrained weights; bound as its projects/MGN is. In training the model takes {'images': (B, 3, H, W)
    float32 in 0…255, 'targets': (B,)} and returns losses by name, inside an EventStorage; otherwise images, to (B,
    2048).
    """
    without_init('fastreid')
    config, modeling, solver = (importlib.import_module(f'fastreid.{name}')
                                for name in ('config', 'modeling', 'solver.build'))
    settings = config.get_cfg()
    settings.merge_from_list([
        'MODEL.DEVICE', device, 'MODEL.META_ARCHITECTURE', 'MGN', 'MODEL.BACKBONE.LAST_STRIDE', 2,
        'MODEL.HEADS.NUM_CLASSES', num_classes,
        'MODEL.HEADS.EMBEDDING_DIM', 256, 'MODEL.HEADS.WITH_BNNECK', True, 'MODEL.HEADS.NECK_FEAT', 'after',
        'MODEL.HEADS.POOL_LAYER', 'GlobalMaxPool', 'MODEL.LOSSES.NAME', ('CrossEntropyLoss', 'TripletLoss'),
        'MODEL.LOSSES.CE.EPSILON', 0.1, 'MODEL.LOSSES.CE.SCALE', 2.0,  # times the 0.125 of its heads: 0.25
        'MODEL.LOSSES.TRI.MARGIN', 1.2, 'MODEL.LOSSES.TRI.HARD_MINING', True,
        'MODEL.LOSSES.TRI.SCALE', 5 / 3,  # times its 0.2: 1/3
        'SOLVER.OPT', 'Adam', 'SOLVER.BASE_LR', 3.5e-4, 'SOLVER.WEIGHT_DECAY', 5e-4, 'SOLVER.BIAS_LR_FACTOR', 2.0,
        'SOLVER.WEIGHT_DECAY_BIAS', 0.0])
    model = modeling.build_model(settings)
    return model, *solver.build_optimizer(settings, model)


def torchreid_evaluate_rank():
    """torchreid.reid.metrics.rank.eval_market1501, which PyPI has without its Cython: (distmat, pids and camids,
    max_rank) → cmc, mAP."""
    without_init('torchreid', 'torchreid.reid', 'torchreid.reid.metrics')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        rank = importlib.import_module('torchreid.reid.metrics.rank')
    return lambda *args: rank.eval_market1501(*args, 50)


def metric_learning_triplet_loss(margin):
    """pytorch-metric-learning's batch-hard miner and triplet loss, Euclidean, mean over anchors."""
    from pytorch_metric_learning import distances, losses, miners, reducers

    euclidean = distances.LpDistance(normalize_embeddings=False, p=2)
    miner = miners.BatchHardMiner(distance=euclidean)
    loss = losses.TripletMarginLoss(margin=margin, distance=euclidean, reducer=reducers.MeanReducer())
    return lambda features, labels: loss(features, labels, miner(features, labels))


def torchreid_re_ranking():
    """torchreid.reid.utils.rerank.re_ranking: (q_g_dist, q_q_dist, g_g_dist, k1, k2, lambda_value) → (Q, G)."""
    without_init('torchreid', 'torchreid.reid', 'torchreid.reid.utils')
    return importlib.import_module('torchreid.reid.utils.rerank').re_ranking


def fastreid_re_ranking():
    """fastreid.evaluation.rerank.re_ranking, the same."""
    without_init('fastreid', 'fastreid.evaluation')
    return importlib.import_module('fastreid.evaluation.rerank').re_ranking
