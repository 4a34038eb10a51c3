"""How far a long command is: a bar where somebody looks on, plain lines in a log."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A log gets a line each tenth of the way.
_LINES = 10


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how much was done; the end may come before `total`."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bars:
            bar = bars.add_task(description, total=total)
            yield lambda amount: bars.advance(bar, amount)
            bars.update(bar, completed=total)
        return
    done, shown = 0, 0

    def advance(amount: int) -> None:
        nonlocal done, shown
        done += amount
        if done * _LINES // total > shown:
            shown = done * _LINES // total
            print(f"{description}: {done:,} of {total:,} sequences", file=sys.stderr, flush=True)

    yield advance
    print(f"{description}: finished after {done:,} sequences", file=sys.stderr, flush=True)
