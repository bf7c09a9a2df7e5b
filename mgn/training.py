"""The training loop: batches → losses → steps, with logs, checkpoints and evaluations on the way."""

import difflib
import inspect
import logging
import os
import time

import gin
import torch
from torch.nn.parallel import DistributedDataParallel

from mgn import checkpoint as checkpoints
from mgn import processes
from mgn.augmentation import Augmentation, Draws
from mgn.datasets import check_dataset, train_labels
from mgn.evaluation import evaluate, find_device, table, write_results
from mgn.images import TrainBatches, batches
from mgn.losses import mgn_losses
from mgn.model import MGN, MGNOutput
from mgn.ops import implementation
from mgn.optim import make_optimizer, multi_step
from mgn.runlog import RunLog, progress, write_text
from mgn.sampler import IdentitySampler

logger = logging.getLogger(__name__)

EVALUATION_NAMES = ('step', 'rank1', 'rank5', 'rank10', 'mAP', 'mAP_trapezoid', 'mINP')
UNREADABLE_LIMIT = 0.01  # share of the training images beyond which a run stops


@gin.configurable(denylist=['default_output_dir'])
def train(default_output_dir, dataset=gin.REQUIRED, output_dir=None, input_size=gin.REQUIRED, P=16, K=4,
          total_steps=gin.REQUIRED, schedule=multi_step, seed=0, workers=4, device='auto', log_every=50,
          checkpoint_every=1000, evaluate_every=2000, clip_gradient_norm=None, precision='float32', resume=True,
          mining='all', sync_bn=False):
    """Trains MGN on dataset.train, evaluates it on dataset.query and dataset.gallery; returns the model.

    Goes on from output_dir/last.pth where there is one. Every random draw depends on (seed, step, position) alone, so
    on a CPU an interrupted and resumed run ends with the very weights of an uninterrupted one.

    Under torchrun each process takes P / processes of the identities, and the gradient is the mean over all; process 0 alone writes.
    Batches are those of one process, and so is the loss, but for batch normalisation, whose statistics are each process's own unless
    sync_bn. Running statistics are averaged over the processes where a checkpoint is written or the model evaluated.

    Args:
        dataset: Dataset. output_dir: where everything is written; None: default_output_dir.
        input_size: (H, W) in pixels. P, K: identities in a batch and images of each.
        schedule: (step, total_steps) → factor of the learning rate.
        log_every, checkpoint_every, evaluate_every: periods in steps. Checkpoints are written before evaluations too;
            evaluations happen before the first step and after the last one too.
        clip_gradient_norm: largest Euclidean norm of the whole gradient; None: any.
        precision: of the model's forward and backward pass in training: 'float32', or 'bfloat16' by autocast. Weights,
            losses and evaluations are float32.
        resume: False refuses an output_dir that holds a run.
        mining: 'all': anchors find their hardest pairs among the images of all processes; 'process': among those of their own.
        sync_bn: batch statistics of all processes together; on GPUs only.
    """
    for name, period in (('log_every', log_every), ('checkpoint_every', checkpoint_every),
                         ('evaluate_every', evaluate_every), ('total_steps', total_steps)):
        if period < 1:
            raise ValueError(f'want train.{name} >= 1, got {period}')
    check_dataset(dataset)
    if precision not in ('float32', 'bfloat16'):
        raise ValueError(f"want train.precision to be 'float32' or 'bfloat16', got {precision!r}")
    output_dir = output_dir or os.path.abspath(default_output_dir)
    device = find_device(device)
    check_split(P, mining, sync_bn, device)
    first = processes.number() == 0
    if first:
        os.makedirs(output_dir, exist_ok=True)
    last = processes.share(load_last(output_dir, resume) if first else None)

    labels, num_classes = train_labels(dataset.train)
    sampler = IdentitySampler(labels, [sample.camid for sample in dataset.train], P, K, seed)
    augmentation = Augmentation()
    train_batches = TrainBatches(dataset.train, labels, sampler, augmentation, input_size, processes.part(range(P * K)))
    torch.manual_seed(seed)  # of the initial weights; nothing else draws from torch
    model = MGN(num_classes, fresh=last is None and first)  # the others get those weights from process 0
    model.to(device, memory_format=torch.channels_last).train()
    group = processes.group_of(device)
    network = distributed(model, device, group, sync_bn)
    optimizer = make_optimizer(model)
    meter = Meter()
    step = start = restore(last, model, optimizer, meter, num_classes, output_dir) if last else 0
    log = RunLog(output_dir if first else None, step)

    def save_last():
        average_statistics(model)
        meter.join()
        check_finite(model, meter, step, output_dir)
        if not first:
            return
        checkpoints.save(os.path.join(output_dir, 'last.pth'), {
            'config': gin.config_str(), 'num_classes': num_classes, 'step': step, 'model': model.state_dict(),
            'optimizer': optimizer.state_dict(),
            'optimizer_class': type(optimizer).__name__, 'meter': meter.state()})
        write_text(os.path.join(output_dir, 'config.gin'), gin.operative_config_str())

    if not last:
        save_last()  # a run stopped before its first checkpoint resumes, too
    logger.info('training on %s%s from step %d to %d, %d steps an epoch, output in %s; mgn.ops: %s', device,
                f' in each of {processes.count()} processes' if processes.count() > 1 else '', step, total_steps, sampler.steps_per_epoch,
                output_dir, implementation(device))
    loader = iter(batches(train_batches, range(step, total_steps), workers, device))
    unreadable = {}
    with progress(total_steps, initial=step) as bar:
        while True:
            if is_due(step, evaluate_every, total_steps) and not processes.share(log.evaluated(step)):
                evaluate_step(model, dataset, device, step, num_classes, log, output_dir)
            if step >= total_steps:
                break
            began = time.perf_counter()
            batch = next_batch(loader)
            meter.waited += time.perf_counter() - began
            count_unreadable(unreadable, batch.unreadable, len(dataset.train))
            lr = set_lr(optimizer, schedule(step, total_steps))
            try:
                losses = train_step(network, optimizer, augmentation, batch, device, precision, clip_gradient_norm,
                                    group if mining == 'all' else None)
            except ValueError as error:  # on the CPU mining refuses features that are not finite
                check_finite(model, meter, step, output_dir)  # an earlier loss, or a weight, says more
                what = str(error).split('\n  In call to configurable')[0]
                raise ValueError(f'{what} (step {step}; {last_good(output_dir)})') from None
            meter.add(losses, step)
            step += 1
            if is_due(step, log_every, total_steps):
                for found in processes.gather(list(unreadable)):
                    count_unreadable(unreadable, found, len(dataset.train))
                record = {'step': step, 'epoch': (step - 1) // sampler.steps_per_epoch, **meter.read(output_dir), 'lr': lr}
                meter.seconds += time.perf_counter() - began
                log_step(log, bar, {**record, **meter.speed(P * K)})
            else:
                meter.seconds += time.perf_counter() - began
            bar.update()
            if is_due(step, checkpoint_every, total_steps) or is_due(step, evaluate_every, total_steps):
                save_last()
    log.close()
    if first:
        if step > start:  # else this process has not used all of the configuration
            write_text(os.path.join(output_dir, 'config.gin'), gin.operative_config_str())
        print(summary(log, output_dir))
    return model


def check_split(P, mining, sync_bn, device):
    """Raises ValueError where the batch cannot be split, or the options do not fit the processes."""
    if mining not in ('all', 'process'):
        raise ValueError(f"want train.mining to be 'all' or 'process', got {mining!r}; 'all' mines among the images of all processes")
    if P % processes.count():
        raise ValueError(f'want P, the identities of a batch, as a multiple of the processes, got P = {P} and {processes.count()} processes; '
                         f'bind another P or start another number')
    if mining == 'process' and P == processes.count() > 1:
        raise ValueError(f"want 2 identities in each process to mine there, got P = {P} and {processes.count()} processes; bind "
                         f"train.mining = 'all' or a larger P")
    if sync_bn and processes.count() > 1 and device.type != 'cuda':
        raise ValueError(f'want GPUs for train.sync_bn = True, as torch synchronises nowhere else, got {device}; bind train.sync_bn = False')


def distributed(model, device, group, sync_bn):
    """The model to call in training: alone itself, else one that averages gradients over the processes."""
    if processes.count() == 1:
        return model
    if sync_bn:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'  # its name up to torch 2.14
    return DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None, process_group=group,
                                   gradient_as_bucket_view=True, **{buffers: False})


def average_statistics(model):
    """Makes the running statistics of batch normalisation those of all processes."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(processes.mean(buffer))


def is_due(step, period, total_steps):
    return step % period == 0 or step == total_steps


def next_batch(loader):
    """The next TrainBatch; an error raised in a worker process comes without the traceback that is wrapped round it there."""
    try:
        return next(loader)
    except ValueError as error:
        raise ValueError(str(error).rsplit('\nValueError: ', 1)[-1]) from None


def train_step(model, optimizer, augmentation, batch, device, precision, clip_gradient_norm, group=None):
    """One optimiser step on a TrainBatch; returns the losses by name, left on the device.

    `group`: of the processes whose images are mined together; None: each its own.
    """
    images, labels, *draws = (x.to(device, non_blocking=True) for x in (batch.images, batch.labels, *batch.draws))
    images = augmentation(images, Draws(*draws)).contiguous(memory_format=torch.channels_last)  # (B, 3, H, W) float32
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bfloat16'):
        output = model(images)
    if precision != 'float32':
        output = MGNOutput(tuple(x.float() for x in output.logits), output.embeddings.float(), output.features)
    among = (processes.gather_with_gradient(output.embeddings, 1, group), processes.gather_with_gradient(labels, 0, group)) if group else ()
    losses = mgn_losses(output, labels, *among)
    loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    if clip_gradient_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_gradient_norm)
    optimizer.step()
    return {name: value.detach() for name, value in {'loss': loss, **losses}.items()}


def set_lr(optimizer, factor):
    """Sets every group to factor × its initial learning rate; returns that of the weights."""
    for group in optimizer.param_groups:
        group['lr'] = group['initial_lr'] * factor
    return optimizer.param_groups[0]['lr']


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


def last_good(output_dir):
    path = os.path.join(output_dir, 'last.pth')
    if not os.path.exists(path):
        return 'there is no checkpoint yet'
    return f'the last good checkpoint is {path}, of step {checkpoints.load(path)["step"]}'


def load_last(output_dir, resume):
    """The content of output_dir/last.pth, or None for a fresh run; ValueError where that would overwrite another run."""
    last, best = (os.path.join(output_dir, name) for name in ('last.pth', 'best.pth'))
    if os.path.exists(last):
        if not resume:
            raise ValueError(f'want an output_dir without a run, as train.resume = False, got {last}; '
                             f'bind another output_dir or train.resume = True')
        return checkpoints.load(last)
    if os.path.exists(best):
        raise ValueError(f'want an empty output_dir or a run to go on with, got {best} without last.pth; '
                         f'move it or bind another output_dir')
    return None


def restore(last, model, optimizer, meter, num_classes, output_dir):
    """Puts a run back to where `last` was saved; returns its step. Learning rates and decay stay those configured now."""
    path = os.path.join(output_dir, 'last.pth')
    if last['num_classes'] != num_classes:
        raise ValueError(f'want to go on with {path}, trained on {last["num_classes"]} identities, got a data set of '
                         f'{num_classes}; bind the data set it was trained on or another output_dir')
    if 'optimizer' not in last:
        raise ValueError(f'want the whole state of a run in {path}, got weights alone; move it or bind another output_dir')
    changes = [line for line in difflib.unified_diff(last['config'].splitlines(), gin.config_str().splitlines(), n=0,
                                                     lineterm='') if line[:1] in '+-' and line[:3] not in ('+++', '---')]
    if changes:
        logger.warning('resuming under another configuration than before:\n  %s', '\n  '.join(changes))
    if last['optimizer_class'] != type(optimizer).__name__:
        raise ValueError(f'want the optimiser {last["optimizer_class"]} that {path} was trained with, got '
                         f'{type(optimizer).__name__}; bind make_optimizer.optimizer = @{last["optimizer_class"]} or '
                         f'another output_dir')
    checkpoints.load_model(model, last['model'], path)
    optimizer.load_state_dict({**last['optimizer'], 'param_groups': optimizer.state_dict()['param_groups']})
    meter.load_state(last['meter'])
    return last['step']


def count_unreadable(unreadable, new, images):
    """Adds this batch's unreadable images to {text: True}; ValueError beyond UNREADABLE_LIMIT of the set."""
    for text in new:
        if text not in unreadable:
            unreadable[text] = True
            logger.warning('unreadable image number %d, another of its identity takes its place: %s', len(unreadable), text)
    if len(unreadable) > UNREADABLE_LIMIT * images:
        raise ValueError(f'want at most {UNREADABLE_LIMIT:.0%} of {images} training images unreadable, got '
                         f'{len(unreadable)}:\n  ' + '\n  '.join(unreadable) + '\nrestore or remove them')


def evaluate_step(model, dataset, device, step, num_classes, log, output_dir):
    """Evaluates into metrics.jsonl and eval.json; keeps the weights as best.pth where mAP is the best so far."""
    results = {'step': step, **evaluate(model, dataset, device)}
    if processes.number() > 0:
        return
    best = os.path.join(output_dir, 'best.pth')
    if not os.path.exists(best) or results['mAP'] > checkpoints.load(best)['mAP']:
        checkpoints.save(best, {'config': gin.config_str(), 'num_classes': num_classes, 'step': step,
                                'mAP': results['mAP'], 'model': model.state_dict()})
    log.write({name: results[name] for name in EVALUATION_NAMES})
    write_results(results, output_dir)
    logger.info('evaluation of step %d\n%s', step, table(results))


def log_step(log, bar, record):
    log.write(record)
    shown = {'loss': f'{record["loss"]:.3f}', 'lr': f'{record["lr"]:.2e}', 'images/s': f'{record["images_per_s"]:.1f}'}
    bar.set_postfix(shown)
    if bar.disable:
        details = ', '.join(f'{name} {value:.3f}' for name, value in record.items()
                            if name not in ('step', 'epoch', 'loss', 'lr', 'images_per_s'))
        logger.info('step %d: %s, %s', record['step'], ', '.join(f'{k} {v}' for k, v in shown.items()), details)


def summary(log, output_dir):
    """The run's last evaluation beside its first and its best, in per cent."""
    evaluations = [record for record in log.records if 'mAP' in record]
    if not evaluations:
        return f'no evaluation stands in {log.path}'
    lines = ['  step   Rank-1     mAP    mINP']
    for record in (evaluations[0], max(evaluations, key=lambda r: r['mAP']), evaluations[-1]):
        lines.append(f'{record["step"]:6d}' + ''.join(f'{100 * record[name]:9.2f}' for name in ('rank1', 'mAP', 'mINP')))
    return '\n'.join([*dict.fromkeys(lines), f'checkpoints, metrics and configuration are in {output_dir}'])
