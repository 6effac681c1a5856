"""The errors a caller can act on. One message string each, so that they pickle across processes.

Every one carries the exit code the command line ends with. A user's mistake or a fault of the outside
world is one of these; a programmer's mistake is an ``assert``; anything else propagates as it is.
"""


class CaprayError(Exception):
    """A fault that stops the job and will not get better by itself: exit code 1."""

    exit_code = 1


class TryAgain(CaprayError):
    """What passes by itself or with somebody's help from outside; the same command goes on: exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75


class ConfigError(CaprayError):
    """A setting, path or combination the user has to change: exit code 2."""

    exit_code = 2


class OutputConflictError(ConfigError):
    """The output belongs to another job."""


class LeaseHeldError(TryAgain):
    """Another run is writing the output, or has taken it over."""


class CheckpointError(CaprayError):
    """A model folder that is damaged, incomplete, too new, or unsafe to load."""


class DataError(CaprayError):
    """Input data that cannot be used as it is."""


class StorageError(CaprayError):
    """Storage that cannot be reached, read or written."""


class StorageUnavailable(StorageError, TryAgain):
    """Storage that does not answer for now, or no longer takes credentials that have expired."""


class WriteUnanswered(StorageUnavailable):
    """A write that may have happened or not: no answer in time, a broken connection, an error inside the store."""


class Interrupted(CaprayError):
    """Stopped by a signal; what was published is kept and the same command goes on."""

    def __init__(self, message: str, signal_number: int = 2):
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number

    def __reduce__(self):
        return type(self), (self.args[0], self.signal_number)


class ImagesFailed(CaprayError):
    """Images have failed, and the caller wanted to know by the exit code: 3."""

    exit_code = 3
