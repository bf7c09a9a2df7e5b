"""What a configuration asks of a device's arithmetic → the type that a model's forward pass runs in."""

import logging

import torch

from mgn.ops.ranking.product import available

logger = logging.getLogger(__name__)

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def resolve(precision, device, name):
    """'float32', 'bfloat16' or 'float16': `precision` itself, or for 'auto' bfloat16 where the device has units for it, else float32, logged.

    device: torch.device. name: the binding that `precision` comes from, as log and error call it.
    Raises ValueError for any other precision.
    """
    if precision not in ('auto', *DTYPES):
        raise ValueError(f"want {name} to be one of 'auto', {', '.join(map(repr, DTYPES))}, got {precision!r}; 'float32' runs everywhere")
    if precision != 'auto':
        return precision
    chosen = available('bfloat16', device)
    has = {'cuda': 'a GPU of capability 8.0 or higher', 'cpu': 'a CPU with AVX512-BF16 or AMX'}.get(device.type)
    why = f'{device} is {"" if chosen == "bfloat16" else "not "}{has}' if has else f'nothing is known of bfloat16 on {device}'
    logger.info("%s = 'auto' is %s: %s", name, chosen, why)
    return chosen
