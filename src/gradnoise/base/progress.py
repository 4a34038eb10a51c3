"""How far a long command is: a bar where somebody looks on, plain lines in a log."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A log gets a line each tenth of the way.
_LINES = 10


class Progress:
    """What was done of a total that shrinks when part of the work turns out to be needless."""

    def __init__(self, total: int, show: Callable[["Progress"], None]) -> None:
        self.done, self.total, self._show = 0, total, show

    def advance(self, amount: int) -> None:
        """So much more was done."""
        self.done += amount
        self._show(self)

    def skip(self, amount: int) -> None:
        """So much will not be done: a run stopped early, or a checkpoint had it."""
        self.total -= amount
        self._show(self)


@contextmanager
def progress(description: str, total: int) -> Iterator[Progress]:
    """Show how much of `total` sequences was done, as the block says."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bars

        with Bars(console=Console(stderr=True)) as bars:
            bar = bars.add_task(description, total=total)
            yield Progress(total, lambda now: bars.update(bar, completed=now.done, total=now.total))
        return
    shown = 0

    def line(now: Progress) -> None:
        nonlocal shown
        if now.total and now.done * _LINES // now.total > shown:
            shown = now.done * _LINES // now.total
            print(f"{description}: {now.done:,} of {now.total:,} sequences", file=sys.stderr, flush=True)

    told = Progress(total, line)
    yield told
    print(f"{description}: finished after {told.done:,} sequences", file=sys.stderr, flush=True)
