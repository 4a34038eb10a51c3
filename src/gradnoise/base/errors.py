"""The one exception that bad input raises."""


class InputError(ValueError):
    """Bad input, said in one line: which field, which value, and how to mend it.

    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, field: str, value: object, mend: str) -> None:
        super().__init__(f"{field}: {value}: {mend}")
