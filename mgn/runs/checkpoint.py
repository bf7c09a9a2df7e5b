"""Checkpoints: written whole or not at all, loaded without running anything that a file might hold."""

import errno
import os
import zipfile

import torch

FORMAT = 'mgn checkpoint 1'


def save(path, content, older=None):
    """Writes {name: tensors, numbers, strings and containers of them} to `path`, replacing it only once all is on disk.

    older: where the file that was there before goes; None: nowhere.
    Raises OSError where it cannot be written; a file that was there before stays as it was.
    """
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        with open(temporary, 'wb') as file:
            torch.save({'format': FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        if older and os.path.exists(path):
            os.replace(path, older)
        os.replace(temporary, path)
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)  # else a power cut may forget the renaming
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        kept = 'the previous one is unharmed' if os.path.exists(path) else 'there was none before'
        raise OSError(f'want to write the checkpoint {path}, got: {first_line(error)}; {kept}; '
                      f'free disk space or bind another output_dir') from error
    finally:
        if os.path.exists(temporary):  # stopped half-way, by whatever
            os.remove(temporary)


class Damaged(ValueError):
    """A checkpoint that is not what was written: cut short, or of other checksums."""


def load(path):
    """The content of a checkpoint, tensors on the CPU, once its checksums are found right.

    Raises FileNotFoundError, Damaged, ValueError where the file is no checkpoint of this project, or OSError where it cannot be read.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'want a checkpoint, found no file {path}; correct the path')
    wanted = f'want a checkpoint written by mgn.train, got {path}'
    try:
        with zipfile.ZipFile(path) as file:  # as torch.save writes it, with a CRC-32 of every tensor, which torch.load does not look at
            other = file.testzip()
    except Exception as error:  # damaged bytes can raise nearly anything, and EINVAL where they lead outside the file
        if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise Damaged(f'{wanted}, which is none or damaged ({first_line(error)}); give another file') from error
    if other:
        raise Damaged(f'{wanted}, which is damaged: {other} in it has another checksum than was written; give another file')
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # unpickling foreign bytes, too
        damaged = 'PytorchStreamReader' in str(error)  # the headers between the tensors
        raise (Damaged if damaged else ValueError)(f'{wanted}, which cannot be loaded as one ({first_line(error)}); give another file') from error
    if not isinstance(content, dict) or content.get('format') != FORMAT:
        raise ValueError(f'{wanted}, which holds something else; ImageNet weights go into MGN.pretrained')
    return content


def first_line(error):
    return (str(error).splitlines() or [repr(error)])[0]


def load_model(model, state, path, features_only=False):
    """Loads a state dict strictly; with features_only its classifiers are left out.

    Raises ValueError listing the missing, unexpected and ill-shaped keys.
    """
    if features_only:
        state = {key: value for key, value in state.items() if '.classifier.' not in key}
    wanted = model.state_dict()
    problems = [f'missing {key}' for key in wanted if key not in state]
    problems += [f'unexpected {key}' for key in state if key not in wanted]
    problems += [f'{key}: want shape {tuple(wanted[key].shape)}, got {tuple(state[key].shape)}'
                 for key in wanted if key in state and wanted[key].shape != state[key].shape]
    if problems:
        raise ValueError(f'want weights of the configured architecture, {path} does not fit it:\n  '
                         + '\n  '.join(problems) + '\nbind MGN as it was trained, or give other weights')
    model.load_state_dict(state)
