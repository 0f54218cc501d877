"""The errors a user is meant to read: one sentence that names the place, the fault and the remedy."""


class MmoeError(Exception):
    """Base of every error whose message is addressed to the user; the CLI prints it without a traceback."""


class ConfigError(MmoeError):
    """A configuration that cannot run: names the key, the reason and the remedy."""


class DataError(MmoeError):
    """A file or sample that cannot be used: names the file, the key inside it and the remedy."""


class Refused(DataError):
    """An item that cannot become a sample: `reason` is the class it is counted under, the message says it in full."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)  # both, so that the exception survives pickling
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1]


class BackendError(MmoeError):
    """An optional package that a config asks for and that is not usable here."""


class CheckpointError(MmoeError):
    """A checkpoint that cannot be written or read."""


class DivergenceError(MmoeError):
    """A training step whose gradients are not finite; nothing was updated."""
