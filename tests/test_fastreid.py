"""Against PyPI's fastreid, where it is installed (`make peers`): features of both layouts, losses and gradients."""

import importlib
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from fastreid_layouts import HEADS, layout_a
from test_model import shake

import mgn
from benchmarks import peers
from mgn import config, weights
from mgn.data.images import TrainBatch
from mgn.losses import mgn_losses
from mgn.model import MGN
from mgn.optim import make_optimizer
from mgn.runs import checkpoint
from mgn.schedules import cosine
from mgn.step import set_lr, train_step

FROZEN = ['backbone', 'b1', 'b2', 'b3']
pytestmark = [pytest.mark.usefixtures('clean_gin'), pytest.mark.skipif(
    find_spec('fastreid') is None, reason='fastreid is not installed; `make peers` does')]


def fastreid_mgn(ibn, classes=751):
    """fast-reid's MGN and configuration as its configs/*/mgn_R50-ibn.yml has them, weights as after some training."""
    peers.without_init('fastreid')
    settings = importlib.import_module('fastreid.config').get_cfg()
    settings.merge_from_list([
        'MODEL.DEVICE', 'cpu', 'MODEL.META_ARCHITECTURE', 'MGN', 'MODEL.BACKBONE.LAST_STRIDE', 1,
        'MODEL.BACKBONE.WITH_IBN', ibn, 'MODEL.HEADS.NUM_CLASSES', classes, 'MODEL.HEADS.EMBEDDING_DIM', 256,
        'MODEL.HEADS.WITH_BNNECK', True, 'MODEL.HEADS.NECK_FEAT', 'after', 'MODEL.HEADS.POOL_LAYER',
        'GeneralizedMeanPoolingP', 'MODEL.HEADS.CLS_LAYER', 'CircleSoftmax', 'MODEL.HEADS.SCALE', 64,
        'MODEL.HEADS.MARGIN', 0.35, 'MODEL.LOSSES.NAME', ('CrossEntropyLoss', 'TripletLoss'),
        'MODEL.LOSSES.CE.EPSILON', 0.1, 'MODEL.LOSSES.CE.SCALE', 1.0, 'MODEL.LOSSES.TRI.MARGIN', 0.0,
        'MODEL.LOSSES.TRI.HARD_MINING', True, 'MODEL.LOSSES.TRI.SCALE', 1.0, 'SOLVER.OPT', 'Adam', 'SOLVER.BASE_LR',
        3.5e-4, 'SOLVER.WEIGHT_DECAY', 5e-4, 'SOLVER.BIAS_LR_FACTOR', 1.0, 'SOLVER.WEIGHT_DECAY_BIAS', 5e-4,
        'MODEL.FREEZE_LAYERS', [rf'{name}\.' for name in FROZEN], 'SOLVER.FREEZE_ITERS', 2])  # b1 is b1_head, too
    torch.manual_seed(0)
    model = importlib.import_module('fastreid.modeling').build_model(settings)
    means = model.pixel_mean.clone(), model.pixel_std.clone()
    shake(model)
    model.pixel_mean, model.pixel_std = means
    return model, settings


def pixels(count, height=384, width=128):
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize('ibn', [True, False])
@pytest.mark.parametrize('layout', ['A', 'B'])
def test_no_element_of_a_feature_differs_from_fast_reids_by_a_ten_thousandth(tmp_path, layout, ibn):
    peer, batch = fastreid_mgn(ibn)[0].eval(), pixels(2)
    with torch.no_grad():
        state, features = layout_a(peer) if layout == 'A' else (peer.state_dict(), lambda images: peer(images.clone()))
        want = F.normalize(features(batch))
    torch.save({'model': state}, tmp_path / 'w.pth')
    got = mgn.load(str(tmp_path / 'w.pth'), device='cpu').embed(batch.byte())
    assert got.shape == want.shape == (2, 2048) and want.std() > 0.01
    assert (got - want).abs().max() < 1e-5


def exponents_of(model):
    return [pool.p for pool in model.pools]


def test_losses_and_gradients_of_the_later_recipe_are_fast_reids(tmp_path):
    """The peer in double precision too: rounding would choose other hardest pairs."""
    peer = fastreid_mgn(ibn=True, classes=11)[0].double().train()
    batch = pixels(8, 192, 64).double()  # maps of 12 rows, which stripes divide
    labels = torch.tensor([0, 0, 3, 3, 7, 7, 10, 10])
    config.load(['gin/market_ibn.gin'], ['MGN.pretrained = False'])
    model = MGN(11).double().train()
    torch.save({'model': peer.state_dict()}, tmp_path / 'w.pth')
    state = weights.load_checkpoint(str(tmp_path / 'w.pth'))['model']
    checkpoint.load_model(model, state, 'w.pth')
    with importlib.import_module('fastreid.utils.events').EventStorage():
        want = peer({'images': batch.clone(), 'targets': labels})
    sum(want.values()).backward()
    got = mgn_losses(model((batch - peer.pixel_mean) / peer.pixel_std), labels)
    sum(got.values()).backward()
    for ours, theirs in {'cross_entropy': 'loss_cls', 'triplet': 'loss_triplet'}.items():
        terms = [value.item() for name, value in want.items() if name.startswith(theirs)]
        assert got[ours].item() == pytest.approx(sum(terms), rel=1e-4) and len(terms) == {'triplet': 5}.get(ours, 8)
    gradients = dict(model.named_parameters())
    names = {key: weights.our_name(key, third=5) for key, _ in peer.named_parameters()}
    for key, parameter in peer.named_parameters():
        if parameter.grad is None:  # the frozen bias of a neck
            assert key.endswith('bottleneck.1.bias')
            continue
        if names[key].endswith('.p'):
            exponents = torch.cat([p.grad[part] for part in (slice(1), slice(1, None)) for p in exponents_of(model)])
            ours = exponents[HEADS.index(key.split('_')[0])]
        else:
            ours = gradients[names[key]].grad
        theirs = parameter.grad.reshape(ours.shape)
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-12, key


def curves(path, steps, images, labels):
    """Losses of `steps` steps of fast-reid's model and optimizer and of ours, from the same weights: (steps, 2) each.

    The images are as they are after augmentation; learning rates those of warm-up; two steps are frozen.
    """
    peer, settings = fastreid_mgn(ibn=True, classes=11)
    peer.double()
    torch.save({'model': peer.state_dict()}, path)
    model = MGN(11).double().train()
    checkpoint.load_model(model, weights.load_checkpoint(path)['model'], path)
    optimizer = make_optimizer(model)
    solver = importlib.import_module('fastreid.solver.build')
    peer_optimizer = solver.build_optimizer(settings, peer, contiguous=False)[0]
    frozen, result = [model.trunk, model.branches], ([], [])

    class NoAugmentation:
        def __call__(self, batch, draws):
            return (batch - peer.pixel_mean) / peer.pixel_std

    for step in range(steps):
        batch, factor = images(step), cosine(step, 12120)
        for group in peer_optimizer.param_groups:
            group['lr'] = 3.5e-4 * factor
        for name in FROZEN:
            getattr(peer, name).train(step >= 2)
        with importlib.import_module('fastreid.utils.events').EventStorage():
            losses = peer({'images': batch.clone(), 'targets': labels})
        peer_optimizer.zero_grad()
        sum(losses.values()).backward()
        peer_optimizer.step()
        result[0].append([sum(v.item() for k, v in losses.items() if kind in k) for kind in ('cls', 'triplet')])
        set_lr(optimizer, factor)
        for module in frozen:
            module.train(step >= 2)
        batch = TrainBatch(batch, labels, [labels] * 4, [])
        losses = train_step(model, optimizer, NoAugmentation(), batch, torch.device('cpu'), 'float32', None,
                            frozen=frozen if step < 2 else ())
        result[1].append([losses['cross_entropy'].item(), losses['triplet'].item()])
    return torch.tensor(result[0]), torch.tensor(result[1])


@pytest.mark.long
def test_the_first_steps_of_the_later_recipe_have_the_losses_of_fast_reids(tmp_path):
    config.load(['gin/market_ibn.gin'], ['MGN.pretrained = False'])
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(0, 256, (20, 8, 3, 96, 48), generator=generator).double()
    labels = torch.tensor([0, 0, 3, 3, 7, 7, 10, 10])
    want, got = curves(str(tmp_path / 'w.pth'), 20, lambda step: batches[step], labels)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert (want[0] - want[5]).abs().min() > 0.01  # both have learnt
