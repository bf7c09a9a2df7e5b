"""Parameters → optimiser with its groups; step → factor of the learning rate."""

import math
from bisect import bisect_right

import gin
import torch

for optimizer in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
    gin.external_configurable(optimizer, module='torch.optim')


@gin.configurable(denylist=['model'])
def make_optimizer(model, optimizer=gin.REQUIRED, bias_lr_factor=2.0, bias_weight_decay=0.0):
    """An optimiser over the trainable parameters of `model`, those whose name contains "bias" in a group of their own.

    `optimizer` is called with the groups alone: learning rate and weight decay are its own bindings (Adam.lr, …), so it
    has to be gin's version of a class (@Adam), which knows them. Biases get bias_lr_factor × lr and bias_weight_decay,
    as in fast-reid. Each group keeps its `initial_lr`.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = [p for name, p in named if 'bias' not in name]
    biases = [p for name, p in named if 'bias' in name]
    result = optimizer([{'params': weights}, {'params': biases}])
    result.param_groups[1]['lr'] *= bias_lr_factor
    result.param_groups[1]['weight_decay'] = bias_weight_decay
    for group in result.param_groups:
        group['initial_lr'] = group['lr']
    return result


@gin.configurable(denylist=['step', 'total_steps'])
def multi_step(step, total_steps, warmup_steps=2000, warmup_factor=0.01, milestones=(8000, 14000), gamma=0.1):
    """Linear warm-up, then × gamma at every milestone; steps count from 0. Returns the factor of the learning rate."""
    return warmup(step, warmup_steps, warmup_factor) * gamma ** bisect_right(milestones, step)


@gin.configurable(denylist=['step', 'total_steps'])
def cosine(step, total_steps, warmup_steps=2000, warmup_factor=0.01, start=0, final_factor=0.0):
    """Linear warm-up, constant until step `start`, then half a cosine to final_factor at total_steps."""
    progress = min(max(step - start, 0) / max(total_steps - start, 1), 1)
    return warmup(step, warmup_steps, warmup_factor) * (
        final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * progress)))


def warmup(step, warmup_steps, warmup_factor):
    return 1 if step >= warmup_steps else warmup_factor + (1 - warmup_factor) * step / warmup_steps
