"""The reasons for which a training ends early."""


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why."""


class Interrupted(Exception):  # noqa: N818  # not an error
    """Ctrl-C or SIGTERM ended the training, and its state is saved."""
