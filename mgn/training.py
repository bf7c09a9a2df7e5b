"""The training loop: batches → losses → steps, with logs, checkpoints and evaluations on the way."""

import difflib
import inspect
import logging
import os
import time
from contextlib import nullcontext

import gin
import torch
from torch.nn.parallel import DistributedDataParallel

from mgn.runs import checkpoint as checkpoints
from mgn.runs import processes
from mgn.data.augmentation import Augmentation, Draws
from mgn.averaging import WeightAverage
from mgn.data.datasets import check_dataset, train_labels
from mgn.evaluation import evaluate
from mgn.results import table, write_results
from mgn.features import check_alike
from mgn.data.images import TrainBatches
from mgn.runs.interruption import STATUS, Interruption
from mgn.losses import mgn_losses
from mgn.runs.meter import Meter, check_finite
from mgn.model import MGN, MGNOutput
from mgn.ops import implementation
from mgn.optim import make_optimizer, multi_step
from mgn.devices import find_device, resolve_precision
from mgn.runs.folder import last_good, locked, newest, save
from mgn.runs.log import RunLog, progress, write_text
from mgn.data.sampler import IdentitySampler
from mgn.data.supply import count_unreadable, supply

logger = logging.getLogger(__name__)

EVALUATION_NAMES = ('step', 'rank1', 'rank5', 'rank10', 'mAP', 'mAP_trapezoid', 'mINP')


@gin.configurable(denylist=['default_output_dir'])
def train(default_output_dir, dataset=gin.REQUIRED, output_dir=None, input_size=gin.REQUIRED, P=16, K=4,
          total_steps=gin.REQUIRED, schedule=multi_step, seed=0, workers=4, device='auto', log_every=50,
          checkpoint_every=1000, keep_last=1, evaluate_every=2000, clip_gradient_norm=None, precision='auto', ema_decay=None,
          compile=False, resume=True, mining='all', sync_bn=False):
    """Trains MGN on dataset.train, evaluates it on dataset.query and dataset.gallery; returns the model.

    Goes on from output_dir/last.pth where there is one, or from the newest older checkpoint that is whole. Every random draw depends on
    (seed, step, position) alone, so on a CPU an interrupted and resumed run of one process ends with the very weights of an uninterrupted one.
    At SIGTERM or SIGINT it ends behind the step under way, with a checkpoint, by SystemExit(75); at the second one at once.

    Under torchrun each process takes P / processes of the identities, and the gradient is the mean over all; process 0 alone writes.
    Batches are those of one process, and so is the loss, but for batch normalisation, whose statistics are each process's own unless
    sync_bn. Running statistics are averaged over the processes where a checkpoint is written or the model evaluated.

    Args:
        dataset: Dataset. output_dir: where everything is written, by one run at a time; None: default_output_dir.
        input_size: (H, W) in pixels. P, K: identities in a batch and images of each.
        schedule: (step, total_steps) → factor of the learning rate.
        log_every, checkpoint_every, evaluate_every: periods in steps. Checkpoints are written before evaluations too;
            evaluations happen before the first step and after the last one too.
        keep_last: older checkpoints kept beside last.pth, as step_<n>.pth.
        clip_gradient_norm: largest Euclidean norm of the whole gradient; None: any.
        precision: of the model's forward and backward pass in training, by autocast: 'float32', 'bfloat16', 'float16' (with loss scaling), or
            'auto': 'bfloat16' where the device has units for it, else 'float32'. Weights, losses and mining are float32.
        ema_decay: of an exponential moving average of the weights (`mgn.averaging`), which is evaluated and is best.pth; None: no average.
        compile: the model goes through torch.compile.
        resume: False refuses an output_dir that holds a run.
        mining: 'all': anchors find their hardest pairs among the images of all processes; 'process': among those of their own.
        sync_bn: batch statistics of all processes together; on GPUs only.
    """
    for name, value, least in (('log_every', log_every, 1), ('checkpoint_every', checkpoint_every, 1), ('keep_last', keep_last, 0),
                               ('evaluate_every', evaluate_every, 1), ('total_steps', total_steps, 1)):
        if value < least:
            raise ValueError(f'want train.{name} >= {least}, got {value}')
    check_dataset(dataset)
    output_dir = output_dir or os.path.abspath(default_output_dir)
    device = find_device(device)
    precision = resolve_precision(precision, device, 'train.precision')
    processes.check_same('precision', precision, "bind train.precision to one that all machines are fast at, e.g. 'float32'")
    check_split(P, mining, sync_bn, device)
    first = processes.number() == 0
    with locked(output_dir) if first else nullcontext() as check_lock, Interruption() as interruption:
        path, last = processes.share((newest(output_dir, resume) if first else None) or (None, None))
        check_alike(dataset, ('train',))
        labels, num_classes = train_labels(dataset.train)
        sampler = IdentitySampler(labels, [sample.camid for sample in dataset.train], P, K, seed)
        augmentation = Augmentation()
        train_batches = TrainBatches(dataset.train, labels, sampler, augmentation, input_size, processes.part(range(P * K)))
        torch.backends.cudnn.benchmark = device.type == 'cuda'
        torch.manual_seed(seed)  # of the initial weights; nothing else draws from torch
        model = MGN(num_classes, fresh=last is None and first)  # the others get those weights from process 0
        model.to(device, memory_format=torch.channels_last).train()
        group = processes.group_of(device)
        network = distributed(model, device, group, sync_bn)
        optimizer = make_optimizer(model)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == 'float16')
        meter = Meter()
        step = start = restore(path, last, model, optimizer, scaler, meter, num_classes) if last else 0
        average = weight_average(model, ema_decay, path, last) if ema_decay is not None else None
        evaluated = average.model if average else model
        if compile:
            network = torch.compile(network)
        log = RunLog(output_dir if first else None, step)
        fresh, saved = not last, step if path and os.path.basename(path) == 'last.pth' else None  # the step of last.pth, where it is whole
        del last  # as large as model and optimiser

        def save_last():
            nonlocal saved
            average_statistics(model)
            if average:
                average_statistics(average.model)
            meter.join()
            check_finite(model, meter, step, output_dir)
            if first and step != saved:
                check_lock()
                log.flush()
                save(output_dir, {
                    'config': gin.config_str(), 'num_classes': num_classes, 'step': step, 'model': model.state_dict(),
                    'average': average.model.state_dict() if average else None, 'optimizer': optimizer.state_dict(),
                    'optimizer_class': type(optimizer).__name__, 'scaler': scaler.state_dict(), 'meter': meter.state()}, keep_last, saved)
                write_text(os.path.join(output_dir, 'config.gin'), gin.operative_config_str())
            saved = step

        if fresh:
            save_last()  # a run stopped before its first checkpoint resumes, too
        logger.info('training on %s%s from step %d to %d, %d steps an epoch, in %s, output in %s; mgn.ops: %s', device,
                    f' in each of {processes.count()} processes' if processes.count() > 1 else '', step, total_steps, sampler.steps_per_epoch,
                    precision, output_dir, implementation(device))
        loader = supply(train_batches, range(step, total_steps), workers, device)
        unreadable = {}
        with progress(total_steps, initial=step) as bar:
            while True:
                if interruption.asked():
                    save_last()
                    logger.info('%s: ended behind step %d, which last.pth holds; the same command goes on',
                                interruption.noted.name if interruption.noted else 'a signal to another process', step)
                    processes.wait()  # torchrun ends all that are left where one has ended
                    raise SystemExit(STATUS)
                if is_due(step, evaluate_every, total_steps) and not processes.share(log.evaluated(step)):
                    with interruption.at_once():
                        evaluate_step(evaluated, dataset, device, step, num_classes, log, output_dir)
                if step >= total_steps:
                    break
                began = time.perf_counter()
                batch = next(loader)
                meter.waited += time.perf_counter() - began
                count_unreadable(unreadable, batch.unreadable, len(dataset.train))
                lr = set_lr(optimizer, schedule(step, total_steps))
                try:
                    losses = train_step(network, optimizer, augmentation, batch, device, precision, clip_gradient_norm,
                                        group if mining == 'all' else None, scaler)
                except ValueError as error:  # on the CPU mining refuses features that are not finite
                    check_finite(model, meter, step, output_dir)  # an earlier loss, or a weight, says more
                    what = str(error).split('\n  In call to configurable')[0]
                    raise ValueError(f'{what} (step {step}; {last_good(output_dir)})') from None
                if average:
                    average.update(model, step)
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


def train_step(model, optimizer, augmentation, batch, device, precision, clip_gradient_norm, group=None, scaler=None):
    """One optimiser step on a TrainBatch; returns the losses by name, left on the device.

    `group`: of the processes whose images are mined together; None: each its own. `scaler`: GradScaler of the loss in float16.
    """
    images, labels, *draws = (x.to(device, non_blocking=True) for x in (batch.images, batch.labels, *batch.draws))
    images = augmentation(images, Draws(*draws)).contiguous(memory_format=torch.channels_last)  # (B, 3, H, W) float32
    with torch.autocast(device.type, getattr(torch, precision), enabled=precision != 'float32'):
        output = model(images)
    if precision != 'float32':
        output = MGNOutput(tuple(x.float() for x in output.logits), output.embeddings.float(), output.features)
    among = (processes.gather_with_gradient(output.embeddings, 1, group), processes.gather_with_gradient(labels, 0, group)) if group else ()
    losses = mgn_losses(output, labels, *among)
    loss = sum(losses.values())
    optimizer.zero_grad()
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    scaler.scale(loss).backward()
    if clip_gradient_norm is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_gradient_norm)
    scaler.step(optimizer)  # in float16 not where a gradient is not finite
    scaler.update()
    return {name: value.detach() for name, value in {'loss': loss, **losses}.items()}


def set_lr(optimizer, factor):
    """Sets every group to factor × its initial learning rate; returns that of the weights."""
    for group in optimizer.param_groups:
        group['lr'] = group['initial_lr'] * factor
    return optimizer.param_groups[0]['lr']


def restore(path, last, model, optimizer, scaler, meter, num_classes):
    """Puts a run back to where `last`, read from `path`, was saved; returns its step. Learning rates and decay stay those configured now."""
    if last['num_classes'] != num_classes:
        raise ValueError(f'want to go on with {path}, trained on {last["num_classes"]} identities, got a data set of '
                         f'{num_classes}; bind the data set it was trained on or another output_dir')
    if 'optimizer' not in last:
        raise ValueError(f'want the whole state of a run in {path}, got weights alone; move it or bind another output_dir')
    logger.info('going on from %s, of step %d', path, last['step'])
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
    if scaler.is_enabled() and last.get('scaler'):
        scaler.load_state_dict(last['scaler'])
    meter.load_state(last['meter'])
    return last['step']


def weight_average(model, decay, path, last):
    """The WeightAverage of a run, as `last` holds it; of one that had none, from the weights of now on."""
    average = WeightAverage(model, decay)
    if last and last.get('average'):
        checkpoints.load_model(average.model, last['average'], path)
    return average


def evaluate_step(model, dataset, device, step, num_classes, log, output_dir):
    """Evaluates into metrics.jsonl and eval.json; keeps the weights as best.pth where mAP is the best so far."""
    results = {'step': step, **evaluate(model, dataset, device)}
    if processes.number() > 0:
        return
    best = os.path.join(output_dir, 'best.pth')
    if results['mAP'] > best_so_far(best):
        checkpoints.save(best, {'config': gin.config_str(), 'num_classes': num_classes, 'step': step,
                                'mAP': results['mAP'], 'model': model.state_dict()})
    write_results(results, output_dir)
    log.write({name: results[name] for name in EVALUATION_NAMES})  # the last: with this line, the evaluation has been
    logger.info('evaluation of step %d\n%s', step, table(results))


def best_so_far(path):
    """The mAP of best.pth, less than any where there is none; a damaged one is put aside."""
    try:
        return checkpoints.load(path)['mAP']
    except FileNotFoundError:
        return -1.0
    except checkpoints.Damaged as error:
        logger.warning('a damaged checkpoint is renamed to %s.damaged, and this evaluation is the best so far: %s', path, error)
        os.replace(path, f'{path}.damaged')
        return -1.0


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
