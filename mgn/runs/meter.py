"""What a run measures: mean losses, the first step whose losses were not finite, images per second."""

import torch

from mgn.ops.errors import UserError
from mgn.runs import processes


NEVER = torch.iinfo(torch.int64).max  # the first bad step of a loss that was always finite


class Meter:
    """Sums of the losses since the last report and the first step at which each was not finite, kept on the device."""

    def __init__(self):
        self.names, self.sums, self.count, self.bad_steps = [], None, 0, torch.tensor(NEVER)
        self.seconds, self.waited, self.timed_steps = 0.0, 0.0, 0

    def add(self, losses, step):
        values = torch.stack(list(losses.values()))
        if self.names != list(losses):  # the first step, or the first one with other losses
            bad, never = dict(zip(self.names, self.bad_steps.flatten())), self.bad_steps.new_tensor(NEVER)
            self.bad_steps = torch.stack([bad.get(name, never) for name in losses])  # 'loss' tells of a term that ends
            self.names, self.sums, self.count = list(losses), torch.zeros_like(values), 0
        self.sums, self.bad_steps = self.sums.to(values.device) + values, self.bad_steps.to(values.device)
        self.bad_steps = torch.where((self.bad_steps == NEVER) & ~values.isfinite(), step, self.bad_steps)
        self.count, self.timed_steps = self.count + 1, self.timed_steps + 1

    def join(self):
        """Replaces the sums by their means over all processes, and each bad step by the first one of any process."""
        if self.sums is not None:
            self.sums = processes.mean(self.sums)
        self.bad_steps = processes.reduced(self.bad_steps, 'MIN')

    def check(self, last_good):
        """Raises UserError with the first bad step and its losses. last_good: clause that names a good checkpoint."""
        bad = {name: step for name, step in zip(self.names, self.bad_steps.flatten().tolist()) if step < NEVER}
        if bad:
            first = min(bad.values())
            names = ', '.join(name for name, step in bad.items() if step == first and name != 'loss') or 'loss'
            raise UserError(f'NaN or infinity in {names} at step {first}; {last_good}. '
                            f'Lower lr, or bind train.clip_gradient_norm.')

    def read(self, last_good):
        """Checks the losses; returns their means since the last call, over all processes, by name."""
        self.join()
        self.check(last_good)
        means = dict(zip(self.names, (self.sums / self.count).tolist()))
        self.sums, self.count = torch.zeros_like(self.sums), 0
        return means

    def speed(self, batch_size):
        """Images per second and the share of time spent waiting for data, since the last call."""
        result = {'images_per_s': self.timed_steps * batch_size / self.seconds, 'data_wait': self.waited / self.seconds}
        self.seconds, self.waited, self.timed_steps = 0.0, 0.0, 0
        return result

    def state(self):
        return {'names': self.names, 'sums': self.sums, 'count': self.count}

    def load_state(self, state):
        names, sums, count = state['names'], state['sums'], state['count']
        named = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not named or not isinstance(count, int) or count < 0 or (0 if sums is None else len(sums)) != len(names):
            raise ValueError('its sums of losses do not fit their names')
        self.names, self.sums, self.count = names, sums, count
