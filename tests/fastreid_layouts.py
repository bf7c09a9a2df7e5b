"""State dicts as fast-reid's MGN has saved them, in both layouts: of weights of ours, or of fast-reid's own modules."""

import torch

HEADS = ('b1', 'b2', 'b3', 'b21', 'b22', 'b31', 'b32', 'b33')
PIXELS = {'pixel_mean': torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1),
          'pixel_std': torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)}


def state_of(model, layout):
    """The state dict that fast-reid would have of the weights of an MGN of ours with the default parts."""
    third = {'resnet50': 5, 'resnet101': 22}[model.architecture['backbone'].removesuffix('_ibn')]
    state = {**PIXELS}
    for name, value in model.trunk.state_dict().items():
        state[f'backbone.{name}'] = value
    for branch, blocks in zip(('b1', 'b2', 'b3'), model.branches):
        for j, block in enumerate(blocks):
            place = f'{branch}.0.{j}' if j < third else f'{branch}.1.{j - third}'
            state |= {f'{place}.{name}': value for name, value in block.state_dict().items()}
    exponents = [p for pool in model.pools for p in getattr(pool, 'p', ())[:1]]
    exponents += [p for pool in model.pools for p in getattr(pool, 'p', ())[1:]]
    for h, (name, head) in enumerate(zip(HEADS, model.heads)):
        reduction = head.reduction.weight[:, :, None, None]
        if layout == 'A':
            state[f'{name}_pool.1.weight'] = reduction
            state |= {f'{name}_pool.2.{key}': value for key, value in head.norm.state_dict().items()}
            state |= {f'{name}_head.bnneck.{key}': value for key, value in head.neck.state_dict().items()}
            state[f'{name}_head.classifier.weight'] = head.classifier.weight
        else:
            state[f'{name}_head.bottleneck.0.weight'] = reduction
            state |= {f'{name}_head.bottleneck.1.{key}': value for key, value in head.neck.state_dict().items()}
            state[f'{name}_head.weight'] = head.classifier.weight
        if exponents:
            state[f'{name}_pool.0.p' if layout == 'A' else f'{name}_head.pool_layer.p'] = exponents[h].reshape(1)
    return {name: value.detach().clone() for name, value in state.items()}


def layout_a(peer):
    """(state dict, images → features) of layout A, composed from the modules of fast-reid's present MGN, `peer`.

    Facts of tag v0.1.1: the first pooling is padded; GeM with one exponent for all heads, a 1×1 convolution, batch
    normalisation and ReLU; then a batch normalisation without bias. Test features in the order of HEADS.
    """
    from torch import nn

    peer.backbone[3] = nn.MaxPool2d(3, 2, 1)
    exponent = peer.b1_head.pool_layer
    pools = {}
    for name in HEADS:
        head = getattr(peer, f'{name}_head')
        pools[name] = nn.Sequential(exponent, head.bottleneck[0], nn.BatchNorm2d(len(head.weight[0])), nn.ReLU())

    trunk = 'backbone', 'b1', 'b2', 'b3'
    state = {key: value for key, value in peer.state_dict().items() if key.split('.')[0] in trunk}
    for name, pool in pools.items():
        head = getattr(peer, f'{name}_head')
        state |= {f'{name}_pool.{key}': value for key, value in pool.state_dict().items()}
        state |= {f'{name}_head.bnneck.{key}': value for key, value in head.bottleneck[1].state_dict().items()}
        state[f'{name}_head.classifier.weight'] = head.weight.detach()

    def features(images):
        shared = peer.backbone((images - PIXELS['pixel_mean']) / PIXELS['pixel_std'])
        maps = {name: branch(shared) for name, branch in (('b1', peer.b1), ('b2', peer.b2), ('b3', peer.b3))}
        maps['b21'], maps['b22'] = maps['b2'].chunk(2, 2)
        maps['b31'], maps['b32'], maps['b33'] = maps['b3'].chunk(3, 2)
        return torch.cat([getattr(peer, f'{name}_head').bottleneck[1](pools[name].eval()(maps[name]))[..., 0, 0]
                          for name in HEADS], 1)
    return {**PIXELS, **state}, features
