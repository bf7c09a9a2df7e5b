"""The training loop: batches → losses → steps, with logs, checkpoints and evaluations on the way."""

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal

import gin
import torch

from mgn.data.augmentation import Augmentation
from mgn.data.datasets import Dataset, check_trainable, train_labels
from mgn.data.images import TrainBatches
from mgn.data.sampler import IdentitySampler
from mgn.data.loader import count_unreadable, load_batches
from mgn.devices import Precision, find_device, resolve_precision
from mgn.evaluation import evaluate
from mgn.features import Extractor, Size, check_same_data, hash_of, image_lists
from mgn.losses import make_losses, mgn_losses
from mgn.model import MGN
from mgn.ops import METRICS, implementation
from mgn.ops.errors import UserError
from mgn.optim import make_optimizer
from mgn.results import table, write_results
from mgn.runs import checkpoint as checkpoints, processes
from mgn.runs.files import write_text
from mgn.runs.folder import best_so_far, locked, newest, remove_older, save_last
from mgn.runs.interruption import STATUS, Interruption
from mgn.runs.log import RunLog, logger, progress
from mgn.runs.meter import Meter
from mgn.schedules import multi_step
from mgn.step import distributed, set_lr, train_step

Steps = Annotated[int, 1, 2 ** 31 - 1]


@gin.configurable('train', denylist=['default_output_dir'])
@dataclass
class Training:
    """A training run, whose options gin binds as train.<name>: `run` trains MGN on dataset.train, evaluates it on
    dataset.query and dataset.gallery, and returns it.

    Resumes from output_dir/last.pth if there is one, or from the newest older checkpoint that is intact. Every random
    draw depends on (seed, step, position) alone, so on a CPU a run of one process that was interrupted and resumed ends
    with weights that are bit-identical to those of an uninterrupted one. At SIGTERM or SIGINT it ends after the present
    step, with a checkpoint, by SystemExit(75); at a second signal at once. An evaluation is aborted; its checkpoint is
    already saved, except for the one before the first step.

    Under torchrun each process takes P / processes of the identities, gradients are averaged, and process 0 alone
    writes. Batches, loss and gradient equal those of a single process. Exception: batch normalisation, whose statistics
    are each process's own. Running statistics are averaged over the processes where a checkpoint is written or the
    model is evaluated.
    """

    default_output_dir: str
    dataset: Dataset = gin.REQUIRED
    output_dir: str | None = None      # where everything is written, by one run at a time; None: default_output_dir
    input_size: Size = gin.REQUIRED    # (H, W) in pixels
    P: Annotated[int, 2, 2 ** 16] = 16  # identities in a batch
    K: Annotated[int, 1, 2 ** 16] = 4  # images of each
    total_steps: Steps = gin.REQUIRED
    schedule: Callable[..., float] = multi_step  # (step, total_steps) → factor of the learning rate
    losses: Callable[..., dict | torch.nn.Module] = mgn_losses  # (output, labels, candidates, candidate_labels) →
    #                                    {name: scalar}, or a class of modules that are called so and have parameters of
    #                                    their own (mgn/losses.py)
    seed: Annotated[int, 0, 2 ** 63 - 1] = 0
    workers: Annotated[int, 0, 1024] = 4  # processes that decode images; 0: the main process does
    device: str = 'auto'
    log_every: Steps = 50
    checkpoint_every: Steps = 1000     # checkpoints are written before evaluations, too
    evaluate_every: Steps = 2000       # an evaluation happens after the last one, too
    evaluate_first: bool = True        # evaluate before the first step, too
    keep_last: Annotated[int, 0, 2 ** 31 - 1] = 1  # older checkpoints kept beside last.pth, as step_<n>.pth
    clip_gradient_norm: Annotated[float, 1e-30, math.inf] | None = None  # largest Euclidean norm of the whole
    #                                    gradient; None: any
    precision: Precision = 'auto'      # of forward and backward pass, by autocast: 'float32', 'bfloat16', 'float16'
    #                                    (with loss scaling), or 'auto': 'bfloat16' if the device has units for it,
    #                                    else 'float32'. Weights, losses and mining are float32.
    compile: bool = False              # the model goes through torch.compile
    resume: bool = True                # False refuses an output_dir that holds a run
    freeze: tuple[str, ...] = ()       # modules, e.g. ('trunk', 'branches'), that do not learn, in evaluation mode,
    freeze_steps: Annotated[int, 0, 2 ** 31 - 1] = 0  # during so many steps from the first on
    mining: Literal['all', 'process'] = 'all'  # anchors find their hardest pairs among the images of all processes, or
    #                                    'process': among those of their own

    def run(self):
        self.check_options()
        self.first = processes.number() == 0
        with locked(self.output_dir) if self.first else nullcontext():
            saved = newest(self.output_dir, self.resume) if self.first else None
            path = processes.share(saved and saved[0])
            if path and not self.first:
                saved = path, checkpoints.load(path)
            self.make_batches()
            self.make_state(saved)
            del saved  # as large as model and optimizer
            if self.first and self.saved_step is not None:  # a run that was killed may have saved, but not removed
                remove_older(self.output_dir, self.saved_step, self.keep_last)
            self.log = RunLog(self.output_dir, self.state.step) if self.first else None
            logger.info('training on %s%s from step %d to %d, %d steps an epoch, in %s, output in %s; mgn.ops: %s',
                        self.device, f' in each of {processes.count()} processes' if processes.count() > 1 else '',
                        self.state.step, self.total_steps, self.sampler.steps_per_epoch, self.precision,
                        self.output_dir, implementation(self.device))
            start = self.state.step
            with Interruption() as interruption, progress(self.total_steps, initial=start) as self.bar:
                self.loop(interruption)
            if self.first and self.state.step > start:  # else this process has not used the whole configuration
                self.write_configuration()
            logger.info('checkpoints, metrics and configuration are in %s', self.output_dir)
        return self.state.model

    def check_options(self):
        """Raises UserError for what cannot be trained; replaces 'auto' and None by what they stand for."""
        check_trainable(self.dataset)
        self.schedule(0, self.total_steps)  # refuses what does not fit
        self.output_dir = os.path.abspath(os.path.expanduser(self.output_dir or self.default_output_dir))
        self.device = find_device(self.device)
        self.precision = resolve_precision(self.precision, self.device, 'train.precision')
        processes.check_same('kind of device, and precision on it', (self.device.type, self.precision),
                             "Bind device, or train.precision to one that all machines are fast at, e.g. 'float32'.")
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)  # torch asks the present one, too, which may be full
        check_split(self.P, self.mining)
        check_same_data(self.dataset, ('train',))

    def make_batches(self):
        samples = self.dataset.train
        labels, self.num_classes = train_labels(samples)
        self.sampler = IdentitySampler(labels, [sample.camid for sample in samples], self.P, self.K, self.seed)
        self.augmentation, self.unreadable = Augmentation(), {}
        self.batches = TrainBatches(samples, labels, self.sampler, self.augmentation, self.input_size,
                                    processes.part(range(self.P * self.K)))

    def make_state(self, saved):
        """Makes model, losses and optimizer: fresh, or as in `saved`, the (path, content) of a checkpoint."""
        torch.backends.cudnn.benchmark = self.device.type == 'cuda'
        torch.manual_seed(self.seed)  # of the initial weights; nothing else draws from torch
        model = MGN(self.num_classes, fresh=saved is None and self.first)  # the others get these weights from process 0
        model.check_size(*self.input_size)
        losses = make_losses(self.losses, self.num_classes, *model.embeddings_shape)
        for module in (model, losses):
            module.to(self.device, memory_format=torch.channels_last).train()
        group = processes.group_of(self.device)
        self.frozen = [module_named(model, name) for name in self.freeze]
        learning = {*model.parameters(), *losses.parameters()}.difference(*(m.parameters() for m in self.frozen))
        if self.freeze_steps and not learning:
            raise UserError(f'train.freeze = {self.freeze} leaves nothing that learns; bind fewer names')
        self.mining_group = group if self.mining == 'all' else None
        self.network, self.network_losses = (distributed(module, self.device, group) for module in (model, losses))
        optimizer = make_optimizer(torch.nn.ModuleList([model, losses]))
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == 'float16')
        self.state = checkpoints.State(model, losses, optimizer, scaler, Meter(), self.num_classes,
                                       hash_of(image_lists(self.dataset, 'train').values()))
        self.saved_step = None  # of last.pth, if it is intact
        self.best = best_so_far(self.output_dir) if saved and self.first else -1.0
        if saved:
            path, content = saved
            if content['step'] > self.total_steps:
                raise UserError(f'{path} is of step {content["step"]}, beyond total_steps = {self.total_steps}. '
                                f'Bind more total_steps, or another output_dir.')
            self.state.restore(content, path)
            check_same_data(self.dataset, (), model)  # machines that see other folders would train other networks
            self.saved_step = self.state.step if os.path.basename(path) == 'last.pth' else None
        self.state.check_finite(self.last_good())
        if self.compile:
            self.network = torch.compile(self.network)

    def loop(self, interruption):
        state, meter = self.state, self.state.meter
        loader = load_batches(self.batches, range(state.step, self.total_steps), self.workers, self.device)
        while True:
            if interruption.asked():
                self.leave(interruption)
            due = self.is_due(self.evaluate_every) and (state.step > 0 or self.evaluate_first)
            if due and not processes.share(self.first and state.step in self.log.evaluated):
                with interruption.at_once():
                    self.measure()
            if state.step >= self.total_steps:
                break
            if self.saved_step is None:  # else what is logged from here on could not be resumed
                self.save()
            began = time.perf_counter()
            try:
                batch = next(loader)
            except UserError:
                if not interruption.noted:
                    raise
                batch = self.batches[state.step]  # the signal, sent to all processes, has ended a worker
            meter.waited += time.perf_counter() - began
            self.step(batch)
            record = self.report() if self.is_due(self.log_every) else None
            meter.seconds += time.perf_counter() - began
            if record and self.first:
                log_step(self.log, self.bar, {**record, **meter.speed(self.P * self.K)})
            self.bar.update()
            if self.is_due(self.checkpoint_every) or self.is_due(self.evaluate_every):
                self.save()

    def is_due(self, period):
        return self.state.step % period == 0 or self.state.step == self.total_steps

    def step(self, batch):
        """Trains on one batch."""
        state = self.state
        count_unreadable(self.unreadable, batch.unreadable, len(self.dataset.train))
        self.lr = set_lr(state.optimizer, self.schedule(state.step, self.total_steps))
        frozen = self.frozen if state.step < self.freeze_steps else ()
        for module in self.frozen if state.step <= self.freeze_steps else ():
            module.train(not frozen)
        try:
            losses = train_step(self.network, state.optimizer, self.augmentation, batch, self.device, self.precision,
                                self.clip_gradient_norm, self.mining_group, state.scaler, self.network_losses, frozen)
        except UserError as error:  # on the CPU mining refuses features that are not finite
            state.check_finite(self.last_good())  # an earlier loss, or a weight, tells more
            raise UserError(f'{error.message} (step {state.step}; {self.last_good()})') from None
        state.meter.add(losses, state.step)
        state.step += 1

    def report(self):
        """A line of the log, but for the speed: means since the last one, over all processes."""
        for paths in processes.gather(list(self.unreadable)):
            count_unreadable(self.unreadable, paths, len(self.dataset.train))
        step = self.state.step
        return {'step': step, 'epoch': (step - 1) // self.sampler.steps_per_epoch,
                **self.state.meter.read(self.last_good()), 'lr': self.lr}

    def save(self):
        """Writes last.pth unless it is of this step already."""
        state = self.state
        state.join()
        state.check_finite(self.last_good())
        if self.first and state.step != self.saved_step:
            save_last(self.output_dir, state.content(), self.keep_last, self.saved_step)
            self.write_configuration()
        self.saved_step = state.step

    def write_configuration(self):
        write_text(os.path.join(self.output_dir, 'config.gin'), gin.operative_config_str())

    def last_good(self):
        if self.saved_step is None:
            return 'there is no checkpoint yet'
        return f'the last good checkpoint is {os.path.join(self.output_dir, "last.pth")}, of step {self.saved_step}'

    def leave(self, interruption):
        """Saves and ends the process after a signal."""
        self.save()
        logger.info('%s: ended after step %d, which last.pth holds; the same command resumes',
                    interruption.noted.name if interruption.noted else 'a signal to another process', self.state.step)
        processes.gather(None)  # waits for all: torchrun ends those that are left when one has ended
        raise SystemExit(STATUS)

    def measure(self):
        """Evaluates into metrics.jsonl and eval.json; keeps the weights as best.pth where mAP is the best so far."""
        state = self.state
        results = {'step': state.step, **evaluate(state.model, self.dataset, Extractor(self.device))}
        if self.saved_step is None:
            self.save()
        if not self.first:
            return
        if results['mAP'] > self.best:
            checkpoints.save(os.path.join(self.output_dir, 'best.pth'), state.weights(results['mAP']))
            self.best = results['mAP']
        write_results(results, self.output_dir)
        self.log.write({name: results[name] for name in ('step', *METRICS)})  # last: this line says that it is complete
        logger.info('evaluation of step %d\n%s', state.step, table(results))


def check_split(P, mining):
    """Raises UserError where the batch cannot be split among the processes."""
    count = processes.count()
    if P % count:
        raise UserError(f'P = {P}, the identities of a batch, is no multiple of the {count} processes. Bind another P.')
    if mining == 'process' and P == count > 1:
        raise UserError(f"Mining in each process needs 2 identities there, but P = {P} is split among {count} "
                        f"processes. Bind train.mining = 'all', or a larger P.")


def module_named(model, name):
    """The module of this name; UserError with the names that there are."""
    modules = dict(model.named_modules())
    if not name or name not in modules:
        raise UserError(f'train.freeze names the module {name!r}, which MGN does not have; bind some of '
                        f'{", ".join(dict(model.named_children()))} or of their parts, such as branches.0')
    return modules[name]


def log_step(log, bar, record):
    log.write(record)
    shown = {'loss': f'{record["loss"]:.3f}', 'lr': f'{record["lr"]:.2e}', 'images/s': f'{record["images_per_s"]:.1f}'}
    bar.set_postfix(shown)
    if bar.disable:
        logger.info('step %d: %s', record['step'], ', '.join(f'{name} {value}' for name, value in shown.items()))
