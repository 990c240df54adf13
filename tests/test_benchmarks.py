"""The benchmarks' own logic: what is timed in which order, what is refused, what is written, and that pages agree."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_similarity, growth, harness, memory, plot, providers, record, report, timing
from benchmarks.contrastive import PROVIDERS, Case, errors, exact, inputs


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty results folder in place of the committed one."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path


# --- timing ---------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_with_another_first_one_each() -> None:
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}  # type: ignore[misc]
    times = harness.interleave(functions, rounds=3, warmup=1, device="cpu")
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.fixture
def nap(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass on a clock that a busy machine does not move."""
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


def test_times_are_those_of_the_function_alone(nap: Callable[[float], None]) -> None:
    functions = {"slow": lambda: nap(0.5), "fast": lambda: nap(0.125)}
    times = harness.interleave(functions, rounds=3, warmup=0, device="cpu")
    assert times == {"slow": [0.5] * 3, "fast": [0.125] * 3}
    assert harness.ratio_to(times["slow"], times["fast"]) == 4


def test_rounds_go_on_until_enough_time_is_spent_and_stop_when_it_is_late(
    nap: Callable[[float], None],
) -> None:
    functions = {"nap": lambda: nap(0.25)}
    more = harness.interleave(functions, rounds=1, min_seconds=2.5, device="cpu")
    assert len(more["nap"]) == 10
    fewer = harness.interleave(functions, rounds=1000, max_seconds=1.25, device="cpu")
    assert len(fewer["nap"]) == 5
    assert len(harness.interleave(functions, rounds=1000, max_seconds=0.25, device="cpu")["nap"]) == 3
    warmed: list[int] = []
    harness.interleave(
        {"nap": lambda: (warmed.append(1), nap(0.25))}, rounds=1, warmup=0, warmup_seconds=1.25, device="cpu"
    )
    assert len(warmed) == 5 + 1


def test_cold_flushes_before_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Flusher:
        def __init__(self, device: str) -> None:
            assert device == "cpu"

        def __call__(self) -> None:
            calls.append("flush")

    monkeypatch.setattr(timing, "CacheFlusher", Flusher)
    work = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    harness.interleave(work, rounds=1, warmup=0, cache="cold", device="cpu")
    assert calls == ["flush", "a", "flush", "b"]


def test_flusher_touches_more_than_the_last_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timing.last_level_cache("cpu") >= 1 << 20
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 1 << 20)
    flusher = timing.CacheFlusher("cpu")
    assert flusher.buffer.nbytes == 2 << 20
    flusher()
    assert bool((flusher.buffer == 1).all())


def test_medians_quantiles_and_ratios() -> None:
    seconds = [0.005, 0.001, 0.002, 0.004, 0.003, 0.006]
    found = harness.summarize(seconds)
    assert found == pytest.approx({"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0})
    # by round: 2, 2, 10, so that one round in which the machine stalled does not count
    assert harness.ratio_to([2.0, 4.0, 10.0], [1.0, 2.0, 1.0]) == 2.0
    with pytest.raises(ValueError):
        harness.ratio_to([1.0, 2.0], [1.0])


# --- memory ---------------------------------------------------------------------------------------------------


def allocate(mib: int) -> Any:
    kept = torch.ones(1 << 20)
    return lambda: (kept, torch.ones(mib << 18))


def fail() -> Any:
    raise ValueError("no such size")


def test_peak_is_what_one_run_adds() -> None:
    mib, seconds = memory.peak_and_seconds(allocate, 48, device="cpu")
    assert 47 <= mib <= 60 and 0 < seconds < 5


def test_a_failing_run_says_why() -> None:
    with pytest.raises(ValueError, match="no such size"):
        memory.peak_and_seconds(fail, device="cpu")


# --- providers ------------------------------------------------------------------------------------------------


def test_registry_says_why_a_provider_cannot_run() -> None:
    registry = providers.Registry()
    registry.add(providers.Provider("here", lambda: None))
    registry.add(providers.Provider("absent", lambda: None, needs=("no_such_module_xyz",)))
    registry.add(providers.Provider("gpu", lambda: None, cuda_only=True))
    usable, reasons = registry.choose(["gpu", "here", "absent"], "cpu")
    assert [provider.name for provider in usable] == ["here"]
    assert reasons["gpu"] == "needs a CUDA GPU" and "no_such_module_xyz" in reasons["absent"]
    with pytest.raises(ValueError, match="twice"):
        registry.add(providers.Provider("here", lambda: None))
    with pytest.raises(ValueError, match=r"no provider 'hree'; there are here, absent, gpu"):
        registry.choose(["hree"], "cpu")


def test_wrong_is_above_the_limit_or_not_a_number() -> None:
    assert providers.wrong({"loss": 1e-6, "gradients": 1e-5}, 1e-5) == ""
    assert "gradients" in providers.wrong({"loss": 1e-6, "gradients": 2e-5}, 1e-5)
    assert "loss" in providers.wrong({"loss": float("nan")}, 1e-5)


@pytest.mark.parametrize("kind", ["random", "trained"])
def test_the_truth_is_the_definition_in_fp64(kind: str) -> None:
    leaves = inputs(Case(37, 8, kind=kind))
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    loss = eager_loss_fp64(*wide)
    loss.backward()
    found = exact(leaves[0], leaves[1], float(leaves[2].detach()), rows=10)
    for got, want in zip(found, [loss.detach(), *(leaf.grad for leaf in wide)], strict=True):
        assert want is not None
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def eager_loss_fp64(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale * x @ y.T
    positives = logits.diagonal()
    return (0.5 * (logits.logsumexp(1) + logits.logsumexp(0)) - positives).mean()


@pytest.mark.parametrize("name", [p.name for p in PROVIDERS.providers.values() if not p.cuda_only])
def test_every_provider_computes_the_same_loss(name: str) -> None:
    provider = PROVIDERS[name]
    if provider.unavailable("cpu"):
        pytest.skip(provider.unavailable("cpu"))
    if name == "compile":
        pytest.skip("compiles for seconds; the benchmark itself checks it")
    case = Case(70, 16)
    leaves = inputs(case)
    found = errors(provider.make(case)(leaves), exact(leaves[0], leaves[1], float(leaves[2].detach())))
    assert providers.wrong(found, bench_similarity.ERROR_LIMIT["float32"]) == ""
    assert ("scale" in found) != name.startswith("sbert")


def test_errors_see_each_fault() -> None:
    leaves = inputs(Case(20, 8))
    want = exact(leaves[0], leaves[1], float(leaves[2].detach()))
    for index, key in enumerate(("loss", "gradients", "gradients", "scale")):
        got: list[Tensor | None] = [t.clone() for t in want]
        assert max(errors(got, want).values()) == 0.0
        spoiled = got[index]
        assert spoiled is not None
        spoiled += 0.5
        assert errors(got, want)[key] > 0.01
        spoiled += torch.nan
        assert providers.wrong(errors(got, want), 1.0) != ""


# --- the suite ------------------------------------------------------------------------------------------------

TINY = ["--n", "48", "96", "--d", "16", "--rounds", "2", "--device", "cpu", "--no-memory"]


def test_suite_writes_figures_with_their_origin(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_similarity.main([*TINY, "--providers", "eager", "recompute", "inf_cl"])
    folder = results / record.machine_name()
    saved = json.loads((folder / "similarity_float32_random.json").read_text())
    assert saved["suite"] == "similarity_float32_random" and saved["threads"] == torch.get_num_threads()
    assert saved["environment"]["versions"]["torch"] == torch.__version__
    assert saved["environment"]["cores"] >= 1 and saved["commit"] and saved["command"]
    assert saved["not_measured"] == {"inf_cl": "needs a CUDA GPU"}
    rows = saved["rows"]
    assert [(row["provider"], row["n"]) for row in rows] == [
        (name, n) for n in (48, 96) for name in ("mm", "mm_out", "eager", "recompute")
    ]
    for row in rows:
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["rounds"] == 2
        useful = 1 if row["provider"].startswith("mm") else 4
        assert row["effective_gflops"] == pytest.approx(
            useful * 2 * row["n"] ** 2 * 16 / row["median_ms"] / 1e6, rel=0.05, abs=0.06
        )
    assert rows[0]["passes"] == 1.0 and rows[1]["gemm_percent"] == 100.0
    assert rows[2]["speedup_over_eager"] == 1.0 and rows[3]["time_over_recompute"] == 1.0
    assert rows[3]["error_gradients"] < 1e-5
    with open(folder / "similarity_float32_random.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["provider"] for line in lines] == [row["provider"] for row in rows]
    assert float(lines[3]["median_ms"]) == rows[3]["median_ms"]
    assert "not measured: inf_cl" in capsys.readouterr().out


def _spoiled(case: Case) -> Any:
    right = PROVIDERS["eager"].make(case)

    def step(leaves: list[Tensor]) -> Any:
        loss, dx, dy, dscale = right(leaves)
        assert dx is not None
        return [loss, 1.01 * dx, dy, dscale]

    return step


@pytest.mark.parametrize("ours", [False, True])
def test_the_speed_of_a_wrong_result_is_refused(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ours: bool
) -> None:
    monkeypatch.setitem(PROVIDERS.providers, "spoiled", providers.Provider("spoiled", _spoiled, ours=ours))
    arguments = [*TINY, "--providers", "recompute", "spoiled"]
    if ours:
        with pytest.raises(SystemExit, match="wrong"):
            bench_similarity.main(arguments)
    else:
        bench_similarity.main(arguments)
    (path,) = results.rglob("*.json")
    rows = [row for row in json.loads(path.read_text())["rows"] if row["provider"] == "spoiled"]
    assert len(rows) == 2
    for row in rows:
        assert "gradients error 1.0e-02" in row["not_timed"]
        assert not {"median_ms", "effective_gflops", "passes"} & row.keys()


def test_what_was_measured_before_a_run_is_ended_is_kept(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = bench_similarity.measure

    def ended(case: Case, *rest: Any) -> Any:
        if case.n == 96:
            raise KeyboardInterrupt
        return right(case, *rest)

    monkeypatch.setattr(bench_similarity, "measure", ended)
    with pytest.raises(KeyboardInterrupt):
        bench_similarity.main([*TINY, "--providers", "recompute"])
    (path,) = results.rglob("*.json")
    assert {row["n"] for row in json.loads(path.read_text())["rows"]} == {48}


def test_one_that_raises_is_named_and_the_others_are_measured(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(case: Case) -> Any:
        raise RuntimeError("out of shared memory\nand more")

    monkeypatch.setitem(PROVIDERS.providers, "broken", providers.Provider("broken", broken))
    bench_similarity.main([*TINY, "--providers", "broken", "recompute"])
    rows = json.loads(next(results.rglob("*.json")).read_text())["rows"]
    found = {row["provider"]: row for row in rows if row["n"] == 96}
    assert found["broken"]["not_timed"] == "RuntimeError: out of shared memory"
    assert found["recompute"]["median_ms"] > 0


def test_defaults_are_those_that_a_device_can_run() -> None:
    cpu = bench_similarity.default_providers("cpu", small=False)
    cuda = bench_similarity.default_providers("cuda", small=False)
    for name in ("eager", "compile", "open_clip", "chunked", "recompute"):
        assert name in cpu and name in cuda
    assert "cached" in cpu and not any(PROVIDERS[name].cuda_only for name in cpu)
    assert {"inf_cl", "cce", "liger"} <= set(cuda)


def test_a_product_too_large_is_made_by_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(10, 4), torch.randn(12, 4)
    assert set(bench_similarity.products(x, y)) == {"mm", "mm_out"}
    monkeypatch.setattr(bench_similarity, "STRIPE_BYTES", 3 * 12 * 4)
    made: list[Tensor] = []
    true_mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: made.append(true_mm(a, b, out=out).clone()))
    (only,) = bench_similarity.products(x, y).items()
    only[1]()
    assert only[0] == "mm_out" and torch.allclose(torch.cat(made), true_mm(x, y.T), atol=1e-5)


def test_growth_is_time_per_pair_over_that_of_the_first_size() -> None:
    first, second = Case(1000, 8), Case(4000, 8)
    rows = growth.rows_of([(first, 1.0, 0.9), (first, 1.0, 1.1), (second, 2.0, 24.0), (first, 1.0, 1.0)])
    assert [row["per_pair_over_first"] for row in rows] == [0.9, 1.1, 1.5, 1.0]
    assert rows[2]["ns_per_pair"] == 1500.0 and rows[2]["mib_of_one_matrix"] == pytest.approx(61.0, abs=0.05)


def test_growth_measures_the_first_size_again_at_the_end(
    monkeypatch: pytest.MonkeyPatch, results: Path
) -> None:
    def in_this_process(setup: Any, case: Case, **_: Any) -> tuple[float, float]:
        loss, dx, _, _ = setup(case)()
        assert loss.isfinite() and dx.shape == (case.n, case.d)
        return 3.0, 0.5

    monkeypatch.setattr(harness, "peak_and_seconds", in_this_process)
    bench_similarity.main(["--growth", "--n", "32", "64", "--d", "8", "--device", "cpu"])
    (path,) = results.rglob("similarity_growth_float32_random.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["n"] for row in rows] == [32, 32, 64, 32, 32]
    assert rows[2]["per_pair_over_first"] == 0.25


# --- plots and pages ------------------------------------------------------------------------------------------


def written(results: Path, rows: list[dict[str, Any]]) -> Path:
    folder = results / "machine"
    folder.mkdir(exist_ok=True)
    path = folder / "suite.json"
    path.write_text(json.dumps({"suite": "suite", "commit": "abc", "threads": 2, "rows": rows}))
    return path


ROWS = [
    {"provider": "a", "n": 256, "d": 8, "median_ms": 1.25},
    {"provider": "a", "n": 512, "d": 8, "median_ms": 5.0},
    {"provider": "b", "n": 256, "d": 8, "median_ms": 2.5, "peak_mib": 7.0},
]


def test_plots_have_every_provider_and_do_not_change_by_themselves(tmp_path: Path) -> None:
    path = written(tmp_path, ROWS)
    assert plot.panels(ROWS) == ["median_ms"]
    assert plot.curves(ROWS, "median_ms") == {"a": [(256, 1.25), (512, 5.0)], "b": [(256, 2.5)]}
    (svg,) = plot.draw_all(tmp_path)
    first = svg.read_bytes()
    assert svg == path.with_suffix(".svg") and b"<svg" in first and len(first) > 5000
    plot.draw_all(tmp_path)
    assert svg.read_bytes() == first
    (png,) = plot.draw_all(tmp_path, "png")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_of_a_single_size(tmp_path: Path) -> None:
    written(tmp_path, ROWS[::2])
    assert plot.draw_all(tmp_path) == []


def test_page_is_written_from_results_and_a_typed_figure_is_found(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    written(results, ROWS)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    options = ["--page", str(page), "--results", str(results)]
    with pytest.raises(SystemExit, match="is not what the results say"):
        report.main([*options, "--check"])
    report.main(options)
    report.main([*options, "--check"])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| a | 512 | 8 | 5 |  |" in text and "| b | 256 | 8 | 2.5 | 7 |" in text
    page.write_text(text.replace("| 2.5 |", "| 2.4 |"))
    with pytest.raises(SystemExit):
        report.main([*options, "--check"])
    with pytest.raises(ValueError, match="markers|one line"):
        report.rewrite("no markers", "")


def test_page_lists_what_became_of_a_gpu_proof(tmp_path: Path) -> None:
    folder = tmp_path / "some-gpu" / "proof"
    folder.mkdir(parents=True)
    outcomes = [
        {"section": "graph", "status": "passed", "reason": "", "seconds": 3.5, "details": {}},
        {
            "section": "tests",
            "status": "failed",
            "reason": "2 failed\nand more",
            "seconds": 60.0,
            "details": {},
        },
    ]
    (folder / "proof.json").write_text(json.dumps({"commit": "abc", "command": "run", "sections": outcomes}))
    page = report.generate(tmp_path)
    assert "## some-gpu" in page and "| graph | passed | 3.5 |  |" in page
    assert "| tests | failed | 60 | 2 failed |" in page


def test_the_performance_page_says_what_the_committed_results_say() -> None:
    report.main(["--check"])
