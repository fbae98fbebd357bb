"""What goes wrong in an update and is no mistake that somebody has thought of, in one sentence all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from continual import errors
from continual.errors import ContinualError, StateError, TrainingError, one_line

MEMORY = "give it more, or a smaller training.batch_size by a try in ladder.settings of rules.yaml."
_OURS = Path(errors.__file__).parent


@contextmanager
def plainly(doing: str, advice: str, *, training: bool = False) -> Iterator[None]:
    """An exception inside becomes a :class:`StateError`, or a :class:`TrainingError` but for what the system refuses.

    Left alone: our own sentences, what ends the process, and an assertion of ours that does not hold, which is our mistake.

    Args:
        doing: what was being done.
        advice: what to do, after a colon.
        training: whether what is done is training, another try of which may go well.
    """
    try:
        yield
    except ContinualError:
        raise
    except Exception as error:
        if isinstance(error, AssertionError) and _is_ours(error):
            raise
        name = type(error).__name__
        reason = one_line(f"{name}: {error}".rstrip(": "))[:200]
        if isinstance(error, OSError):
            raise StateError(f"{doing} broke off ({reason}): mend that, then give the same command again.") from error
        what = "broke off"
        if is_lack_of_memory(error):
            what, advice = "ran out of memory", MEMORY
        sentence, lasting = f"{doing} {what} ({reason}): {advice}", f"{doing} {what} ({name}): {advice}"
        raise (TrainingError(sentence, lasting) if training else StateError(sentence)) from error


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, of the machine or of an accelerator."""
    torchs = type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and torchs)


def _is_ours(error: AssertionError) -> bool:
    """Whether a line of this package raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(_OURS)
