"""Parameters → optimizer with its groups."""

import gin
import torch

for optimizer in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
    gin.external_configurable(optimizer, module='torch.optim')


@gin.configurable(denylist=['model'])
def make_optimizer(model, optimizer=gin.REQUIRED, bias_lr_factor=2.0, bias_weight_decay=0.0):
    """An optimizer over the trainable parameters of `model`, those whose name contains "bias" in a group of their own.

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
