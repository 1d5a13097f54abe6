"""What every verb shares: errors in one line with an exit code, `--help` with an example, progress.

Exit codes: 0 done, 2 something the user can mend (one line on stderr), 130 interrupted, 143
terminated, 141 when nobody reads on (`| head`), 1 a bug (its traceback is kept).
LLAVA_JAX_TRACEBACK=1 shows the traceback of every error.
"""

import argparse
import atexit
import difflib
import io
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, TextIO

_PACKAGE = Path(__file__).resolve().parent
_OUR_FOLDERS = (
    _PACKAGE,
    _PACKAGE.parent / "launch",
    _PACKAGE.parent / "configs",
    _PACKAGE.parent / "benchmarks",
)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a verb's `main` and ends the process with its exit code."""
    ended_by = {"signal": signal.SIGINT}

    def end(number: int, frame: FrameType | None) -> None:
        # A scheduler's SIGTERM leaves no more behind than Ctrl-C does.
        ended_by["signal"] = signal.Signals(number)
        raise KeyboardInterrupt

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know ASCII alone
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)
    try:
        code = main() or 0
    except KeyboardInterrupt:
        _report("interrupted" if ended_by["signal"] == signal.SIGINT else "terminated")
        code = 128 + ended_by["signal"]
        # Libraries may still work in threads of C++, which abort when Python is taken apart.
        atexit.register(_leave, code)
    except BrokenPipeError:
        # Whoever read the output, `head` perhaps, has seen enough. What is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not _raised_by_us(error):
            raise
        _report(f"error: {_message(error)}")
        code = 2
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report(line: str) -> None:
    if os.environ.get("LLAVA_JAX_TRACEBACK") == "1":
        traceback.print_exc()
    print(line, file=sys.stderr)


def _raised_by_us(error: BaseException) -> bool:
    """A ValueError of ours speaks to the user; one from inside a library is a bug of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    file = Path(frames[-1].filename).resolve()
    return any(file.is_relative_to(folder) for folder in _OUR_FOLDERS)


def _message(error: ValueError | OSError) -> str:
    said = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        said = f"{error.strerror.lower()}: {error.filename}"
    # Errors that pass through a trace get a note of JAX's on its own frames.
    notes = (note for note in getattr(error, "__notes__", []) if "its internal frames" not in note)
    return "\n".join([said, *notes])


def parser(doc: str | None, example: str) -> argparse.ArgumentParser:
    """A verb's parser: `doc` is the verb's docstring, `example` a command that runs as it is."""
    return _Parser(
        description=doc,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and names the option that was probably meant."""

    _arguments: Sequence[str] = ()

    def __init__(self, *args, **kwargs):
        # An abbreviation would let a misspelt option pass as another one.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore
        self._arguments = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._arguments, namespace)

    def error(self, message: str) -> NoReturn:
        known = _options(self)
        for argument in self._arguments:
            option = argument.split("=")[0]
            if option.startswith("--") and option not in known:
                # Checked first: argparse would complain of the option it misses instead.
                message = f"unknown option {option}"
                if nearest := difflib.get_close_matches(option, known, n=1):
                    message += f"; did you mean {nearest[0]}?"
                break
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    options = []
    for action in parser._actions:
        options += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                options += _options(child)
    return options


class Progress:
    """Progress on stderr: a bar that redraws on a terminal, now and then a line elsewhere.

    with Progress(len(photos), "reading photos", "photos") as progress:
        for photo in photos:
            ...
            progress.advance()

    done: what was there before, and took no time.
    """

    def __init__(
        self,
        total: int,
        label: str,
        unit: str,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._label, self._unit = total, label, unit
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._on_terminal = self._stream.isatty()
        self._done = self._before = done
        self._start = self._last = clock()
        self._tenths = 0
        self._note = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._show()
        if self._on_terminal:
            self._stream.write("\n")
            self._stream.flush()

    def advance(self, count: int = 1, note: str = "") -> None:
        """note: shown behind the numbers, until the next one."""
        self._done += count
        self._note = note
        now = self._clock()
        waited = now - self._last
        tenths = 10 * self._done // max(self._total, 1)
        # A log wants a line each tenth of the way; less if that is often, more if that is rare.
        due = waited >= 0.1 if self._on_terminal else waited >= 30
        due = due or (not self._on_terminal and tenths > self._tenths and waited >= 1)
        if due and self._done < self._total:  # the last one is shown at the end
            self._last, self._tenths = now, tenths
            self._show()

    def _show(self) -> None:
        line = f"{self._label}: {self._done}/{self._total} {self._unit}"
        elapsed = self._clock() - self._start
        if self._done > self._before and elapsed > 0:
            rate = (self._done - self._before) / elapsed
            line += f", {rate:.1f} {self._unit}/s" if rate >= 1 else f", {1 / rate:.1f} s each"
            left = (self._total - self._done) / rate
            line += f", ETA {_clock_time(left)}" if left > 0 else f", took {_clock_time(elapsed)}"
        line += f", {self._note}" if self._note else ""
        if self._on_terminal:
            width = shutil.get_terminal_size().columns - 1
            bar = "=" * (20 * self._done // max(self._total, 1))
            self._stream.write("\r\x1b[K" + f"[{bar:20}] {line}"[:width])
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
