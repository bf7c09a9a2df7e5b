"""Mistakes of users, told in a sentence: what was expected, what was found, what to do."""


class UserError(ValueError):
    """Ends a binary with its message alone; every other exception keeps its traceback.

    `message` is the sentence itself: gin appends the configurables that were being called to `str(error)`.
    """

    def __init__(self, message):
        super().__init__(message)
        self.message = message


class FileError(UserError, OSError):
    """A file that cannot be read or written."""


class MissingFile(FileError, FileNotFoundError):
    """A file or folder that is not there."""
