"""Python processes that this one starts."""

from __future__ import annotations

import os
import sys


def python_command() -> tuple[str, ...]:
    """This Python, which imports from the current folder, maybe a stranger's checkpoint, only if this process does."""
    return (sys.executable,) if {"", os.getcwd()} & set(sys.path) else (sys.executable, "-P")
