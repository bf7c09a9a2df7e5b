"""Step → factor of the learning rate. Another schedule, such as one cycle, goes here and into `train.schedule`.

Steps count from 0. A schedule raises UserError at every step if it does not fit into total_steps.
"""

import math
from bisect import bisect_right
from typing import Annotated

import gin

from mgn.ops.errors import UserError

Share = Annotated[float, 0, 1]  # of the learning rate


@gin.configurable(denylist=['step', 'total_steps'])
def multi_step(step, total_steps, warmup_steps: int = 2000, warmup_factor: Share = 0.01,
               milestones: tuple[int, ...] = (8000, 14000), gamma: Share = 0.1) -> float:
    """Linear warm-up, and × gamma at every milestone."""
    check_steps(total_steps, {'multi_step.warmup_steps': [warmup_steps], 'multi_step.milestones': milestones})
    return warmup(step, warmup_steps, warmup_factor) * gamma ** bisect_right(milestones, step)


@gin.configurable(denylist=['step', 'total_steps'])
def cosine(step, total_steps, warmup_steps: int = 2000, warmup_factor: Share = 0.01, start: int = 0,
           final_factor: Share = 0.0, period: Annotated[int, 1, 2 ** 31 - 1] = 1) -> float:
    """Linear warm-up, constant until step `start`, then half a cosine to final_factor at total_steps.

    period: steps from one change along the cosine to the next; those of an epoch change it once an epoch.
    """
    check_steps(total_steps, {'cosine.warmup_steps': [warmup_steps], 'cosine.start': [start]})
    progress = min(max(step - start, 0) // period * period / max(total_steps - start, 1), 1)
    return warmup(step, warmup_steps, warmup_factor) * (
        final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * progress)))


def warmup(step, warmup_steps, warmup_factor):
    return 1 if step >= warmup_steps else warmup_factor + (1 - warmup_factor) * step / warmup_steps


def check_steps(total_steps, bindings):
    """Raises UserError for the first of {binding: steps} with steps out of order, below 0 or beyond total_steps."""
    for name, steps in bindings.items():
        if list(steps) != sorted(steps) or any(step < 0 for step in steps):
            raise UserError(f'{name} must be steps from 0 on in ascending order, found {steps}. Bind others.')
        if beyond := steps[bisect_right(steps, total_steps):]:
            raise UserError(f'{name} has step {beyond[0]}, but training ends at total_steps = {total_steps}. '
                            f'Bind a {name} that fits, or more total_steps.')
