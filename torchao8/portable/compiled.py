"""Whether the code of a form is compiled, or runs operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def run(function: Callable[..., None], form: Any, x: Any) -> None:
    function(form, x)
