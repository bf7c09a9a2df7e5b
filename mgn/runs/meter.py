"""What a run measures on its way: losses, whether they are numbers, images per second."""

import torch

from mgn.runs import processes
from mgn.runs.folder import last_good


class Meter:
    """Sums of the losses since the last log and the first step at which each was not finite, kept on the device."""

    def __init__(self):
        self.names, self.sums, self.count, self.bad_steps = [], None, 0, None
        self.seconds, self.waited, self.timed_steps = 0.0, 0.0, 0

    def add(self, losses, step):
        values = torch.stack(list(losses.values()))
        if self.sums is None:
            self.names = list(losses)
            self.sums = torch.zeros_like(values)
        if self.bad_steps is None:
            self.bad_steps = torch.full_like(values, -1, dtype=torch.int64)
        self.sums = self.sums.to(values.device) + values
        self.bad_steps = torch.where((self.bad_steps < 0) & ~values.isfinite(), step, self.bad_steps)
        self.count += 1
        self.timed_steps += 1

    def join(self):
        """Puts the means over all processes in place of the sums, and the first bad step of any in place of each."""
        if self.sums is not None:
            self.sums = processes.mean(self.sums)
        if self.bad_steps is not None:
            never = torch.iinfo(torch.int64).max
            first = processes.minimum(torch.where(self.bad_steps < 0, never, self.bad_steps))
            self.bad_steps = torch.where(first == never, -1, first)

    def check(self, output_dir):
        """Raises ValueError with the first bad step and the losses that were not finite then."""
        if self.bad_steps is None:
            return
        bad = {name: step for name, step in zip(self.names, self.bad_steps.tolist()) if step >= 0}
        if bad:
            first = min(bad.values())
            names = ', '.join(name for name, step in bad.items() if step == first and name != 'loss') or 'loss'
            raise ValueError(f'want finite losses, got NaN or infinity in {names} at step {first}; '
                             f'{last_good(output_dir)}; lower lr, or bind train.clip_gradient_norm')

    def read(self, output_dir):
        """Mean losses since the last call, of all processes, by name; checks them."""
        self.join()
        self.check(output_dir)
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
        self.names, self.sums, self.count = state['names'], state['sums'], state['count']


def check_finite(model, meter, step, output_dir):
    """Raises ValueError where a loss was, or a weight is, not finite: such a state is never saved."""
    meter.check(output_dir)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f'want finite weights, got NaN or infinity in {name} after step {step - 1}; '
                             f'{last_good(output_dir)}; lower lr, or bind train.clip_gradient_norm')
