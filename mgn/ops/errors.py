"""Mistakes of users, told in a sentence: what was expected, what was found, what to do."""


class UserError(ValueError):
    """Ends a binary with its message alone; every other exception keeps its traceback."""


class FileError(UserError, OSError):
    """A file that cannot be read or written."""


class MissingFile(FileError, FileNotFoundError):
    """A file or folder that is not there."""
