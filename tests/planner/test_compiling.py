"""Answers of the compiler: kept by what was asked, refusals read, Ctrl-C heard. It is not asked."""

import dataclasses
import gzip
import signal
import threading

import jax
import pytest
from etils import epath

from llava_jax.planner import compiling
from llava_jax.planner.compiling import DoesNotFit


class Lowered:
    def __init__(self, text: str, answer: object):
        self.text, self.answer, self.compiled = text, answer, 0

    def as_text(self) -> str:
        return self.text

    def compile(self, compiler_options):
        self.compiled += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Answer:
    @dataclasses.dataclass(frozen=True)
    class Memory:
        peak_memory_in_bytes: int = 5

    def memory_analysis(self) -> Memory:
        return self.Memory()

    def as_text(self) -> str:
        return "HloModule m"


def test_an_answer_is_kept_by_all_that_was_asked(tmp_path):
    folder = epath.Path(tmp_path / "kept")
    lowered = Lowered("a program", Answer())
    ask = compiling.compile_for
    waits: list[int] = []
    first = ask(lowered, "v5e-4", {"a": "1"}, folder, waits.append)
    again = ask(lowered, "v5e-4", {"a": "1"}, folder, waits.append)
    assert waits == [0]  # of what is kept, nobody waits
    assert (first.text, first.peak, first.kept, again.kept) == ("HloModule m", 5, False, True)
    assert again[:3] == first[:3]
    ask(lowered, "v5e-8", {"a": "1"}, folder)
    ask(lowered, "v5e-4", {"a": "2"}, folder)
    assert lowered.compiled == 3
    (*_, last) = sorted((tmp_path / "kept").iterdir())
    last.write_bytes(last.read_bytes()[:20])  # a machine that went down
    first_file = min((tmp_path / "kept").iterdir())
    first_file.write_bytes(gzip.compress(b"{}"))
    for topology, options in (("v5e-4", {"a": "1"}), ("v5e-8", {"a": "1"}), ("v5e-4", {"a": "2"})):
        assert ask(lowered, topology, options, folder).text == "HloModule m"
    assert lowered.compiled == 5


def test_ctrl_c_is_heard_while_the_compiler_works(tmp_path):
    """Which is one call of C++ for minutes: here one that ends when the test does."""
    begun, ended = threading.Event(), threading.Event()

    class Slow(Lowered):
        def compile(self, compiler_options):
            begun.set()
            ended.wait(60)
            return Answer()

    def interrupt():
        begun.wait(60)
        signal.raise_signal(signal.SIGINT)

    # A shell's background jobs are born deaf to it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            compiling.compile_for(Slow("a program", None), "v5e-4", {}, epath.Path(tmp_path))
    finally:
        ended.set()
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_told_before_the_compiler_is_asked(tmp_path):
    (tmp_path / "file").write_text("")
    lowered = Lowered("a program", Answer())
    with pytest.raises(OSError, match="file"):
        compiling.compile_for(lowered, "v5e-4", {}, epath.Path(tmp_path / "file"))
    assert lowered.compiled == 0


REFUSALS = {
    # libtpu 0.0.42.1, stage 2 of 7B on v5e-4
    "early": (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (30.29G) exceeds available HBM (15.75G).",
        30.29,
        (),
    ),
    "early, and much more": (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (1.34T) exceeds available HBM (15.75G).",
        1.34 * 2**10,
        (),
    ),
    "with a list": (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.20G of 15.75G hbm. "
        "Exceeded hbm capacity by 1.45G.\n\n  Largest program allocations in hbm:\n\n"
        '  1. Size: 2.00G\n     Operator: op_name="jit(step)/gate" source_file="x.py"\n'
        "     Shape: bf16[32,8192,4096]{2,1,0}\n     Unpadded size: 2.00G\n",
        17.20,
        ("2.00G bf16[32,8192,4096] jit(step)/gate",),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_read_and_kept(tmp_path, name):
    said, needed, largest = REFUSALS[name]
    lowered = Lowered("a program", jax.errors.JaxRuntimeError(said))
    for _ in range(2):
        with pytest.raises(DoesNotFit, match=r"of 15\.75 GiB") as refused:
            compiling.compile_for(lowered, "v5e-4", {}, epath.Path(tmp_path))
        assert refused.value.needed == pytest.approx(needed * 2**30)
        assert refused.value.largest == largest
    assert lowered.compiled == 1


def test_another_error_of_the_compiler_is_a_bug(tmp_path):
    lowered = Lowered("a program", jax.errors.JaxRuntimeError("INTERNAL: oh"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="oh"):
        compiling.compile_for(lowered, "v5e-4", {}, epath.Path(tmp_path))
    assert not list(tmp_path.iterdir())
