"""The published table is what the benchmark plans, and what it says still holds."""

import importlib.metadata
import re
from pathlib import Path

import pytest

from benchmarks import tpu_runs

RESULTS = Path(__file__).resolve().parents[2] / "docs/results.md"


def published() -> dict[str, list[str]]:
    """Cells of the table's rows, by the first three, which say what run it is."""
    section = RESULTS.read_text().split("\n### Runs on the slices people have\n")[1]
    section = section.split("\n### ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| st") or line.startswith("| lora")
    ]
    return {" ".join(row[:3]): row[3:] for row in rows}


def versions() -> dict[str, str]:
    said = RESULTS.read_text().split("\n### Runs on the slices people have\n")[1]
    return dict(re.findall(r"(jax|libtpu) ([\d.]+\d)", said.partition("\n|")[0]))


def name_of(run: tpu_runs.Run) -> str:
    return " ".join(tpu_runs.named(run))


def test_every_run_is_in_the_table_and_none_else():
    assert list(published()) == [name_of(run) for run in tpu_runs.RUNS]


@pytest.mark.tpu_compile
@pytest.mark.parametrize("run", tpu_runs.RUNS, ids=name_of)
def test_it_is_as_published(run):
    """Hours, where the planner has not been asked before."""
    pytest.importorskip("libtpu", reason="the TPU compiler: make test-tpu-compile installs it")
    rows, step, *_, memory, _ = published()[name_of(run)]
    if step == "does not fit":
        with pytest.raises(tpu_runs.DoesNotFit):
            tpu_runs.planned(run, "~/.cache/llava_jax/planned")
        return
    plan = tpu_runs.planned(run, "~/.cache/llava_jax/planned")
    assert plan.peak_hbm_bytes < plan.hbm_bytes
    assert rows == f"{plan.rows_per_chip} × {plan.row_tokens:,}"
    if all(importlib.metadata.version(name) == said for name, said in versions().items()):
        assert plan.step_seconds == pytest.approx(float(step), rel=0.02)
        assert plan.peak_hbm_bytes / 2**30 == pytest.approx(float(memory.split()[0]), rel=0.02)
