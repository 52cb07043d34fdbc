"""The one exception that means "the user can mend this": the command line prints it and exits with status 2."""


class ReftuneError(ValueError):
    """A request that cannot be carried out; the message names the file, row or field, its value, and the way out."""
