"""Checkpoints: what they hold, and how they are written, read and restored. Reading one never runs code from the file.

last.pth holds all of a run (`State.content`); best.pth holds the evaluated weights alone (`State.weights`).
"""

import contextlib
import difflib
import errno
import os
import re
import zipfile
from dataclasses import dataclass
from typing import Any

import gin
import torch

from mgn.ops.arguments import FLOAT_TYPES, INTEGER_TYPES
from mgn.ops.errors import MissingFile, UserError
from mgn.runs import processes
from mgn.runs.files import replacing
from mgn.runs.log import logger

FORMAT = 'mgn checkpoint 1'
FIELDS = {'config': str, 'num_classes': int, 'step': int, 'model': dict, 'losses': dict | None,
          'mAP': float | None}  # what any checkpoint may hold; restoring a run checks the rest
SHOWN = 5  # keys that an error lists from the beginning and from the end
LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # how the files of torch up to 1.5 begin, which have no checksums


class Ignored:
    """Takes the place of NumPy's numbers, which other projects save beside tensors and nothing here needs."""

    def __init__(self, *_):
        pass

    __setstate__ = __init__


NUMBERS = [(Ignored, f'numpy.{name}') for name in ('core.multiarray.scalar', '_core.multiarray.scalar', 'dtype')]


class Damaged(UserError):
    """A checkpoint that is not what was written: cut short, or with other checksums."""


@dataclass
class State:
    """A run behind `step` steps. To add a field: declare it here, write it in `content`, read it in `restore`.

    losses: a module, whose parameters are trained like the model's. images: a hash of the images to train on.
    """
    model: torch.nn.Module
    losses: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Any
    num_classes: int
    images: str
    step: int = 0

    def content(self):
        """What last.pth holds."""
        return {'config': configuration(), 'num_classes': self.num_classes, 'images': self.images,
                'step': self.step, 'model': self.model.state_dict(), 'losses': self.losses.state_dict(),
                'optimizer': self.optimizer.state_dict(), 'optimizer_class': type(self.optimizer).__name__,
                'scaler': self.scaler.state_dict(), 'meter': self.meter.state()}

    def weights(self, mAP):
        """What best.pth holds."""
        return {'config': configuration(portable=True), 'num_classes': self.num_classes, 'step': self.step, 'mAP': mAP,
                'model': self.model.state_dict()}

    def restore(self, content, path):
        """Returns to the step at which `content` was saved to `path`. Learning rates and decay stay as configured.

        Raises UserError where the configured run does not fit the saved one.
        """
        if content['num_classes'] != self.num_classes:
            raise UserError(f'{path} was trained on {content["num_classes"]} identities, but the data set has '
                            f'{self.num_classes}. Bind the data set it was trained on, or another output_dir.')
        if not isinstance(content.get('optimizer'), dict) or not isinstance(content.get('meter'), dict):
            raise UserError(f'{path} holds weights alone, but training resumes only from the whole state of a run. '
                            f'Move the file, or bind another output_dir.')
        logger.info('resuming from %s, step %d', path, content['step'])
        if content.get('images', self.images) != self.images:
            logger.warning('the images to train on, or their pids or camids, differ from those of the checkpoint')
        lines = difflib.unified_diff(content['config'].splitlines(), configuration().splitlines(), n=0, lineterm='')
        changes = [line for line in lines if line[:1] in '+-' and line[:3] not in ('+++', '---')]
        if changes:
            logger.warning('the configuration differs from that of the checkpoint:\n  %s', '\n  '.join(changes))
        if content.get('optimizer_class') != type(self.optimizer).__name__:
            raise UserError(f'{path} was trained with the optimizer {content.get("optimizer_class")}, but '
                            f'{type(self.optimizer).__name__} is configured. Bind make_optimizer.optimizer = '
                            f'@{content.get("optimizer_class")}, or another output_dir.')
        remedy = 'This folder holds another run: bind MGN and train.losses as it was trained, or another output_dir.'
        load_model(self.model, content['model'], path, remedy=remedy)
        load_model(self.losses, content.get('losses') or {}, f'{path} (losses)', remedy=remedy)
        groups = self.optimizer.state_dict()['param_groups']
        try:
            self.optimizer.load_state_dict({**content['optimizer'], 'param_groups': groups})
            check_moments(self.optimizer)
            if self.scaler.is_enabled() and content.get('scaler'):
                self.scaler.load_state_dict(content['scaler'])
            self.meter.load_state(content['meter'])
        except Exception as error:  # of torch and Python, for a state that was made by something else
            raise UserError(f'{path} holds no state that fits the configured optimizer and losses. Bind them as they '
                            f'were trained, or another output_dir.') from error
        self.step = content['step']

    def join(self):
        """Makes equal in all processes what each keeps for itself: running statistics and sums become means."""
        for buffer in (*self.model.buffers(), *self.losses.buffers()):
            if buffer.is_floating_point():
                buffer.copy_(processes.mean(buffer))
        self.meter.join()

    def check_finite(self, last_good):
        """Raises UserError where a loss was, or a weight is, not finite. Such a state is never saved.

        last_good: a clause that names the last good checkpoint.
        """
        self.meter.check(last_good)
        for name, tensor in (*self.model.state_dict().items(), *self.losses.state_dict().items()):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(f'NaN or infinity in the weights {name} after step {self.step - 1}; {last_good}. '
                                f'Lower lr, or bind train.clip_gradient_norm.')


def check_moments(optimizer):
    """Raises ValueError for a state that the kernels of Adam, AdamW and SGD would read wrongly or outside memory.

    Other optimizers, whose states have other forms, check their own.
    """
    names = {'momentum_buffer'} if isinstance(optimizer, torch.optim.SGD) else {'exp_avg', 'exp_avg_sq'}
    names |= {'max_exp_avg_sq'} if optimizer.param_groups[0].get('amsgrad') else set()
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)):
        for parameter, values in optimizer.state.items():
            moments = {name: value for name, value in values.items() if name != 'step' and value is not None}
            if moments and moments.keys() != names or any(
                    misfit(value.cpu(), parameter.cpu()) for value in moments.values()):
                raise ValueError('The state of a parameter has another form')


def configuration(portable=False):
    """gin's configuration as text. Imports are left out: a checkpoint is data.

    portable: bindings with absolute paths are left out too. They belong to this machine.
    """
    text = re.sub(r'(?m)^(import|from) .*\n', '', gin.config_str())
    if portable:  # gin indents the lines of a value that takes several
        text = re.sub(r'(?m)^\S+ =.*\n(    .*\n)*', lambda line: '' if re.search('[\'"]/', line[0]) else line[0], text)
    return text


def save(path, content, keep_as=None):
    """Writes {name: tensors, numbers, strings and containers of them} to `path`, whole or not at all (`replacing`)."""
    with replacing(path, 'wb', keep_as) as file:
        try:
            torch.save({'format': FORMAT, **content}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, (OSError, SystemExit)):  # torch's writer hides a full disk, or a signal
                raise error.__context__ from None
            raise


def load(path):
    """The content of a checkpoint of this project, tensors on the CPU. Raises as `read` and `checked` do."""
    return checked(read(path), path)


def read(path):
    """What torch.save has written to a file, in whatever project, tensors on the CPU. Checksums are verified.

    Raises MissingFile, Damaged, UserError where there is more in it than data, or OSError where it cannot be read.
    """
    if not os.path.isfile(path):
        raise MissingFile(f'There is no file {path}, where weights were expected. Correct the path.')
    with open(path, 'rb') as file:
        legacy = file.read(len(LEGACY)) == LEGACY
    if not legacy:
        with errors_explained(Damaged, f'{path} is damaged or no file of weights'), zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load itself ignores the sums
        if damaged:
            raise Damaged(f'{path} is damaged: {damaged} in it has another checksum than was written. Give another '
                          f'file.')
    with errors_explained(UserError, f'{path} cannot be loaded as weights'), torch.serialization.safe_globals(NUMBERS):
        return plain(torch.load(path, map_location='cpu', weights_only=True), os.path.getsize(path))


def plain(value, size):
    """The value with plain dictionaries: a crafted OrderedDict has attributes in place of methods.

    ValueError for a tensor of more than `size` bytes, the file's: one that repeats its numbers, as `expand` does.
    """
    if isinstance(value, torch.Tensor) and value.numel() * value.element_size() > size:
        raise ValueError(f'a tensor of the shape {tuple(value.shape)} is larger than the file')
    return {key: plain(item, size) for key, item in dict.items(value)} if isinstance(value, dict) else value


def is_own(content):
    return isinstance(content, dict) and content.get('format') == FORMAT


def checked(content, path):
    """The content of a checkpoint, what `read` has returned; UserError where it is none or a field has another type."""
    if not is_own(content):
        raise UserError(f'{path} is no checkpoint of mgn.train: it holds something else. Give another file; '
                        f'weights of other projects go into MGN.pretrained.')
    for name, kind in FIELDS.items():
        if not isinstance(content.get(name), kind) or name == 'step' and not 0 <= content[name] < 2 ** 31:
            raise UserError(f'{path} is no checkpoint of mgn.train: its field {name!r} holds '
                            f'{content.get(name)!r:.60}. Give another file.')
    return content


@contextlib.contextmanager
def errors_explained(kind, message):
    """Foreign or damaged bytes can raise nearly anything: within the block that becomes `kind`, or Damaged.

    What the file's disk and the memory raise stays as it is, except EINVAL: damaged bytes lead outside the file.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        code = re.search(r'GLOBAL (\S+)', str(error))  # torch's own sentence says how to run it
        reason = f'it asks for the code {code[1]}' if code else re.split(r'\n|\. [A-Z]', str(error) or repr(error))[0]
        kind = Damaged if 'PytorchStreamReader' in str(error) else kind  # its headers lie between the tensors
        raise kind(f'{message} ({reason}). Give another file.') from error


def load_model(model, state, path, without=None, remedy='Bind MGN as it was trained, or give other weights.'):
    """Loads a state dict strictly, but for the names with the text `without` in them: those stay as they are.

    Raises UserError with missing, unexpected and ill-shaped keys, ten at most, or with the first that is not finite;
    nothing is loaded then.
    """
    state, expected = ({key: value for key, value in dict(values).items() if not without or without not in str(key)}
                       for values in (state, model.state_dict()))
    problems = [f'{key} is missing' for key in expected if key not in state]
    problems += [f'{key} is unexpected' for key in state if key not in expected]
    problems += [f'{key} {fault}' for key in expected if key in state and (fault := misfit(state[key], expected[key]))]
    if problems:
        if len(problems) > 2 * SHOWN:
            problems[SHOWN:-SHOWN] = [f'… {len(problems) - 2 * SHOWN} more …']
        head = f'The weights in {path} do not fit the configured architecture:'
        raise UserError('\n  '.join([head, *problems]) + f'\n{remedy}')
    if bad := [key for key in expected if not state[key].isfinite().all()]:
        raise UserError(f'The weights in {path} must be finite, but {len(bad)} of their tensors have NaN or infinity, '
                        f'first {bad[0]}; give other weights')
    model.load_state_dict(state, strict=not without)


def misfit(value, expected):
    """What keeps a value of a state dict from taking the place of a tensor; None where it fits."""
    if not isinstance(value, torch.Tensor) or value.is_nested:
        return f'is no tensor, but {value!r:.60}'
    if value.shape != expected.shape:
        return f'has shape {tuple(value.shape)} instead of {tuple(expected.shape)}'
    is_dense = value.layout == torch.strided and value.device.type == 'cpu'
    known = value.dtype in {*FLOAT_TYPES, *INTEGER_TYPES, torch.bool}
    if not is_dense or not known or value.is_floating_point() != expected.is_floating_point():
        wanted = expected.dtype if known else torch.float32
        return f'has type {value.dtype}, {value.layout} on {value.device} instead of {wanted}'
