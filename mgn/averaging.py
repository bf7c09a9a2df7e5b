"""An exponential moving average of a model's weights and running statistics, for evaluations."""

import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Begins as a copy of `model`, in its attribute `model`.

    Make it before torch converts or wraps the model for several processes: such modules hold process groups, which
    cannot be copied.

    decay: share of the average that stays at a step, in [0, 1); 0.999 averages about a thousand steps. In the first
    steps it is (1 + step) / (10 + step) if that is less, so that the initial weights are soon forgotten.
    """

    def __init__(self, model, decay):
        self.decay, self.model = decay, copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model, step):
        """Takes in the weights after step number `step`, from 0."""
        averages, values = ([tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
                            for module in (self.model, model))
        get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))(averages, values, None)
