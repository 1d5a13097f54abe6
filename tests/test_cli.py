"""Exit codes, one-line errors, help, and progress without waiting."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llava_jax
from llava_jax import cli, files


def exit_of(main):
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    return caught.value.code


def our_value_error():
    with files.fresh_folder(Path(__file__).parent):
        pass


def library_value_error():
    int("seven")


def missing_file():
    Path("/no/such/file").read_text()


def interrupted():
    raise KeyboardInterrupt


def test_a_reader_who_has_seen_enough():
    code = (
        "from llava_jax import cli; cli.run(lambda: [print('x' * 999) for _ in range(9999)] and 0)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_terminal_that_knows_ascii_alone():
    code = "from llava_jax import cli; cli.run(lambda: print('3 × missing'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"3 \\xd7 missing\n")


def test_success(capsys):
    assert exit_of(lambda: None) == 0
    assert exit_of(lambda: 3) == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("main", "code", "line"),
    [
        (our_value_error, 2, "error: got "),
        (missing_file, 2, "error: no such file or directory: /no/such/file\n"),
        (interrupted, 130, "interrupted\n"),
    ],
)
def test_errors_of_users_are_one_line(main, code, line, capsys, monkeypatch):
    monkeypatch.delenv("LLAVA_JAX_TRACEBACK", raising=False)
    # What ends an interrupted process would end this one too.
    monkeypatch.setattr("atexit.register", lambda *arguments: None)
    assert exit_of(main) == code
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == 1


def test_traceback_on_request(capsys, monkeypatch):
    monkeypatch.setenv("LLAVA_JAX_TRACEBACK", "1")
    assert exit_of(our_value_error) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.splitlines()[-1].startswith("error: got ")


def test_bugs_keep_their_traceback():
    with pytest.raises(ValueError, match="invalid literal"):
        cli.run(library_value_error)
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


def verb(tmp_path, body):
    """Runs `body` as the file of a verb, in a process of its own."""
    (tmp_path / "verb.py").write_text(f"from llava_jax import cli\ndef main():\n    {body}\n")
    return subprocess.run(
        [sys.executable, "-c", "import verb; verb.cli.run(verb.main)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(llava_jax.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )


def test_exit_codes_of_a_process(tmp_path):
    bug = verb(tmp_path, "return {}['key']")
    assert (bug.returncode, bug.stdout) == (1, "")
    assert bug.stderr.startswith("Traceback")
    user = verb(tmp_path, "open('absent')")
    assert (user.returncode, user.stderr) == (2, "error: no such file or directory: absent\n")


def test_layer_one_starts_without_jax(tmp_path):
    check = verb(tmp_path, "import sys, llava_jax.files; return 7 if 'jax' in sys.modules else 0")
    assert check.returncode == 0, check.stderr


@pytest.fixture
def parser():
    parser = cli.parser("Does something.\n\nIn 100 % of cases.", "python launch/verb.py --config c")
    parser.add_argument("--config", required=True)
    child = parser.add_subparsers(dest="direction").add_parser("export")
    child.add_argument("--format", choices=["hf", "original"])
    return parser


def test_help_shows_the_example(parser, capsys):
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "In 100 % of cases." in shown
    assert shown.endswith("example:\n  python launch/verb.py --config c\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--confg=x", "unknown option --confg; did you mean --config?"),
        ("--config x --zzz", "unknown option --zzz (see"),
        ("--conf x", "unknown option --conf; did you mean --config?"),
        ("--config x export --fromat hf", "unknown option --fromat; did you mean --format?"),
        ("--config x export --format hff", "invalid choice: 'hff'"),
        ("", "required: --config"),
    ],
)
def test_wrong_options(parser, capsys, arguments, says):
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(arguments.split())
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def progress_of(stream, seconds_each, total):
    """What the stream shows of `total` advances, each taking so long."""
    now = 0.0
    with cli.Progress(total, "reading", "photos", stream=stream, clock=lambda: now) as progress:
        for _ in range(total):
            now += seconds_each
            progress.advance()
    return stream.getvalue()


def test_plain_lines_each_tenth():
    lines = progress_of(io.StringIO(), 0.5, 100).splitlines()
    assert len(lines) == 10
    assert lines[0] == "reading: 10/100 photos, 2.0 photos/s, ETA 0:45"
    assert lines[-1] == "reading: 100/100 photos, 2.0 photos/s, took 0:50"


def test_plain_lines_are_few_when_quick_and_steady_when_slow():
    assert len(progress_of(io.StringIO(), 0.001, 100).splitlines()) == 1
    hours = progress_of(io.StringIO(), 100, 100).splitlines()
    assert len(hours) == 100
    assert hours[0] == "reading: 1/100 photos, 100.0 s each, ETA 2:45:00"


def test_a_terminal_redraws_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    shown = progress_of(Terminal(), 1 / 16, 100)
    assert shown.count("\n") == 1
    frames = shown.rstrip("\n").split("\r\x1b[K")[1:]
    assert len(frames) == 50  # no more than ten a second
    assert frames[0].startswith("[                    ] reading: 2/100")
    assert frames[-1].startswith("[====================] reading: 100/100")
    assert max(map(len, frames)) < 60


def test_progress_that_breaks_says_where():
    stream = io.StringIO()
    with pytest.raises(RuntimeError, match="broke"):
        with cli.Progress(10, "reading", "photos", stream=stream, clock=lambda: 0.0) as progress:
            progress.advance(3)
            raise RuntimeError("broke")
    assert stream.getvalue() == "reading: 3/10 photos\n"


def test_progress_that_goes_on():
    now, stream = 0.0, io.StringIO()
    with cli.Progress(
        20, "training", "steps", done=10, stream=stream, clock=lambda: now
    ) as progress:
        now = 4.0
        progress.advance(2)
    assert stream.getvalue().splitlines()[-1] == "training: 12/20 steps, 2.0 s each, ETA 0:16"


def test_progress_over_nothing():
    assert progress_of(io.StringIO(), 1, 0) == "reading: 0/0 photos\n"
