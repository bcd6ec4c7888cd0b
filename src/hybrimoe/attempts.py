"""Steps of which every one is taken, whatever became of those before."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from hybrimoe.errors import DeviceLostError


class Attempts:
    """Takes steps and keeps what they raised, so that one failure does not keep the rest from happening.

    errors: of steps that had to succeed. complaints: of those that only let go of what nobody needs.
    """

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.complaints: list[Exception] = []

    def take(self, step: Callable[..., object], *args: object) -> bool:
        """Call a step whose failure the caller will hear of; says whether it succeeded."""
        try:
            step(*args)
        except BaseException as error:  # whatever it is, the other steps are due all the same
            self.errors.append(error)
            return False
        return True

    def let_go(self, step: Callable[..., object], *args: object) -> bool:
        """The same for a step that gives something back. That a device is lost is known already."""
        try:
            step(*args)
        except DeviceLostError:
            return False
        except Exception as error:  # as above
            self.complaints.append(error)
            return False
        except BaseException as error:
            self.errors.append(error)
            return False
        return True

    def finish(self, what: str) -> None:
        """Raise the first error, if there is one, and warn of complaints; `what` was undone."""
        if self.complaints:
            said = "; ".join(f"{type(error).__name__}: {error}" for error in self.complaints)
            warnings.warn(
                f"{what}, but the accelerator or the disk did not let go in order: {said}",
                RuntimeWarning,
                stacklevel=3,
            )
        if self.errors:
            raise self.errors[0]
