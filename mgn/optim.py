"""Parameters → optimizer with its groups."""

import math
from collections.abc import Callable
from typing import Annotated

import gin
import torch

from mgn.ops.errors import UserError

Factor = Annotated[float, 0, math.inf]

for optimizer in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
    gin.external_configurable(optimizer, module='torch.optim')


@gin.configurable(denylist=['model'])
def make_optimizer(model, optimizer: Callable[..., torch.optim.Optimizer] = gin.REQUIRED,
                   bias_lr_factor: Factor = 2.0, bias_weight_decay: Factor = 0.0) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of `model`, those whose name contains "bias" in a group of their own.

    `optimizer` is called with the groups alone: learning rate and weight decay are its own bindings (Adam.lr, …), so it
    has to be gin's version of a class (@Adam), which knows them. Biases get bias_lr_factor × lr and bias_weight_decay,
    as in fast-reid. Each group keeps its `initial_lr`. Raises UserError for what the optimizer refuses.
    """
    learning = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [[parameter for name, parameter in learning if ('bias' in name) == of_bias] for of_bias in (False, True)]
    try:
        result = optimizer([{'params': parameters} for parameters in groups])
        if result.defaults.get('differentiable'):
            raise ValueError('differentiable = True is for gradients of a step')
    except (ValueError, RuntimeError) as error:  # e.g. a negative learning rate; gin adds lines of its own
        raise UserError(f'The optimizer refuses its bindings: {str(error).splitlines()[0]}; bind others') from None
    result.param_groups[1]['lr'] *= bias_lr_factor
    result.param_groups[1]['weight_decay'] = bias_weight_decay
    for group in result.param_groups:
        group['initial_lr'] = group['lr']
    return result
