"""The error for all problems with a data set."""


class DataError(ValueError):
    """A file of the data set is missing or wrong; the message of one line names the file."""
