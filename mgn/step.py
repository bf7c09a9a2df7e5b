"""One training step: a batch → losses → gradients → new weights, in one process or several."""

import torch
from torch.nn.parallel import DistributedDataParallel

from mgn.data.augmentation import Draws
from mgn.losses import mgn_losses
from mgn.model import MGNOutput
from mgn.runs import processes


def train_step(model, optimizer, augmentation, batch, device, precision, clip_gradient_norm, group=None, scaler=None,
               losses=mgn_losses, frozen=()):
    """One optimizer step on a TrainBatch; returns the losses by name, left on the device.

    group: of the processes whose images are mined together; None: each its own. scaler: GradScaler of the loss in
    float16. losses: mgn_losses, or a module that is called like it and whose parameters `optimizer` has, too. frozen:
    modules whose parameters stay as they are.
    """
    images, labels, *draws = (x.to(device, non_blocking=True) for x in (batch.images, batch.labels, *batch.draws))
    images = augmentation(images, Draws(*draws)).contiguous(memory_format=torch.channels_last)  # (B, 3, H, W) float32
    with torch.autocast(device.type, getattr(torch, precision), enabled=precision != 'float32'):
        output = model(images)
    if precision != 'float32':
        output = MGNOutput(tuple(x.float() for x in output.logits), output.embeddings.float(), output.features)
    candidates = (processes.gather_with_gradient(output.embeddings, 1, group),
                  processes.gather_with_gradient(labels, 0, group)) if group else ()
    terms = losses(output, labels, *candidates)
    loss = sum(terms.values())
    optimizer.zero_grad()
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    scaler.scale(loss).backward()
    for module in frozen:
        module.zero_grad()  # to None: the optimizer passes over it, its own state included
    if clip_gradient_norm is not None:
        scaler.unscale_(optimizer)
        trained = [parameter for options in optimizer.param_groups for parameter in options['params']]
        torch.nn.utils.clip_grad_norm_(trained, clip_gradient_norm)
    scaler.step(optimizer)  # in float16 not where a gradient is not finite
    scaler.update()
    return {name: value.detach() for name, value in {'loss': loss, **terms}.items()}


def set_lr(optimizer, factor):
    """Sets every group to factor × its initial learning rate; returns that of the weights."""
    for group in optimizer.param_groups:
        group['lr'] = group['initial_lr'] * factor
    return optimizer.param_groups[0]['lr']


def distributed(module, device, group):
    """The module to call in training: one that averages gradients over the processes, if there are several."""
    if processes.count() == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    averaging = DistributedDataParallel(module, device_ids=[device] if device.type == 'cuda' else None,
                                        process_group=group, gradient_as_bucket_view=True)
    averaging.broadcast_buffers = False  # equal at first; then each process keeps its own running statistics
    return averaging
