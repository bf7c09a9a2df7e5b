"""An exponential moving average of a model's weights and running statistics, which evaluations use in place of the last ones."""

import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Begins as a copy of `model`, in its `model`.

    decay: what stays of the average at a step, in [0, 1). In the first steps it is (1 + step) / (10 + step) if that is less, so that the
    initial weights are soon forgotten.
    """

    def __init__(self, model, decay):
        if not 0 <= decay < 1:
            raise ValueError(f'want train.ema_decay in [0, 1), or None for no average, got {decay}; 0.999 averages a thousand steps')
        self.decay, self.model = decay, copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model, step):
        """Takes in the weights after step number `step`, from 0."""
        averages, values = ([tensor for tensor in of.state_dict().values() if tensor.is_floating_point()] for of in (self.model, model))
        get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))(averages, values, None)
