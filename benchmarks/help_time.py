"""Seconds of `halflap --help` in a fresh process, and whether it loads torch."""

from __future__ import annotations

import subprocess
import sys

from common import Report, arguments, interleave, spread

COMMAND = (sys.executable, "-m", "halflap", "--help")


def run_help(*flags: str) -> str:
    done = subprocess.run([COMMAND[0], *flags, *COMMAND[1:]], capture_output=True, text=True, check=True)
    return done.stderr


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("help_time", chosen.out, chosen.threads)
    imported = {line.rsplit("|", 1)[-1].strip() for line in run_help("-X", "importtime").splitlines() if "|" in line}
    times = interleave({"halflap": run_help, "python": lambda: subprocess.run([sys.executable, "-c", ""])}, 10)
    seconds = {f"{name}_seconds": spread([1 / t for t in taken]) for name, taken in times.items()}
    report.add(**seconds, loads_torch="torch" in imported)
    report.write()


if __name__ == "__main__":
    main()
