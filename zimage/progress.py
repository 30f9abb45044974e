"""The progress bar of work that takes seconds to minutes."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text


class StepsColumn(MofNCompleteColumn):
    """Steps done of all, nothing for a task whose number of steps is not known."""

    def render(self, task: Task) -> Text:
        """The text of the column."""
        return Text() if task.total is None else super().render(task)


def progress_bar(console: Console) -> Progress:
    """A bar with what is done, steps and time, drawn on a terminal and nowhere else.

    A task with `total=None` moves back and forth; given a total and what is completed, it shows steps.
    """
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        StepsColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
