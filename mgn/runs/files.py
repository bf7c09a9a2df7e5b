"""Files that are written whole or not at all."""

import contextlib
import os

from mgn.ops.errors import FileError


@contextlib.contextmanager
def writing(path, advice):
    """An OSError within the block becomes a FileError that names `path` and ends with `advice`."""
    try:
        yield
    except OSError as error:
        raise FileError(f'{path} could not be written: {error}. {advice}') from error


@contextlib.contextmanager
def replacing(path, mode='w', keep_as=None):
    """Opens a temporary file that takes the name `path` at the end of the block, once its content is on the disk.

    keep_as: new path of the file that was there before; None: it is replaced.
    Makes the folder if necessary. Raises FileError where something cannot be written. After any error the file that was
    there before is unharmed.
    """
    temporary, parent = f'{path}.{os.getpid()}.tmp', os.path.dirname(os.path.abspath(path))
    try:
        with writing(path, 'What was there before is unharmed. Free disk space or choose another folder.'):
            os.makedirs(parent, exist_ok=True)
            with open(temporary, mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep_as and os.path.exists(path):
                os.replace(path, keep_as)
            os.replace(temporary, path)
            folder = os.open(parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # else a power cut may undo the renaming
            finally:
                os.close(folder)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_text(path, text):
    """Writes a small file as `replacing` does."""
    with replacing(path) as file:
        file.write(text)
