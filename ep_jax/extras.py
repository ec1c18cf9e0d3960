"""Optional packages: what is said where one is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports of packages that the extra `name` brings.

    Raises:
        ModuleNotFoundError: one of them is missing; the message names the extra.

    Example:
        >>> with extra("plot"):
        ...     import matplotlib
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "ep_jax":
            raise
        raise ModuleNotFoundError(
            f"{error.name} is not installed; expected the extra {name!r}: "
            f"pip install 'ep_jax[{name}]'",
            name=error.name,
        ) from error
