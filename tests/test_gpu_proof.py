"""The prepared GPU proof: which sections run, what becomes of failures, and that its checks can fail. On a CPU."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_proof
from benchmarks.proof import build, cases, checks, layout, sections, speed, suites, tools
from benchmarks.proof.sections import Context, Outcome, Section, Skip


@pytest.fixture
def context(tmp_path: Path) -> Context:
    (tmp_path / "machine" / "proof" / "logs").mkdir(parents=True)
    return Context("cpu", tmp_path / "machine", 60.0)


# --- which sections, and what becomes of them -----------------------------------------------------------------


def test_every_section_exists_and_names_are_unique() -> None:
    names = [section.name for section in sections.SECTIONS]
    assert len(set(names)) == len(names)
    for section in sections.SECTIONS:
        assert callable(section.load()) and section.load().__doc__


def test_sections_are_chosen_by_name_in_the_order_named() -> None:
    assert [s.name for s in sections.choose(["graph", "build"])] == ["graph", "build"]
    default = [s.name for s in sections.choose(None)]
    assert "ncu" not in default and default[:2] == ["library", "build"] and default[-1] == "targets"
    with pytest.raises(ValueError, match="no section grpah; there are library, build"):
        sections.choose(["graph", "grpah"])


def test_a_failure_does_not_stop_the_run_and_is_listed_last(context: Context) -> None:
    def start(section: Section, _: Context) -> Outcome:
        failed = section.name == "graph"
        return Outcome(
            section.name, "failed" if failed else "passed", "captured nothing" if failed else "", 1.5
        )

    chosen = sections.choose(["library", "graph", "streams"])
    outcomes = gpu_proof.prove(chosen, "cpu", context.out, 1.0, start)
    assert [o.status for o in outcomes] == ["passed", "failed", "passed"]
    summary = gpu_proof.write_summary(outcomes, context.out)
    assert summary.splitlines()[-1] == "FAILED graph: captured nothing"
    assert (context.out / "proof" / "summary.txt").read_text() == summary
    record = json.loads((context.out / "proof" / "proof.json").read_text())
    assert [s["status"] for s in record["sections"]] == ["passed", "failed", "passed"]
    assert record["environment"]["versions"]["torch"] == torch.__version__
    passed = gpu_proof.write_summary(outcomes[::2], context.out)
    assert passed.splitlines()[-1] == "no section failed"


def test_time_is_shared_out_and_what_is_left_is_not_run(context: Context) -> None:
    given: list[float] = []

    def start(section: Section, told: Context) -> Outcome:
        given.append(told.seconds)
        return Outcome(section.name, "passed")

    chosen = [Section("short", "", 30.0), Section("long", "", 1000.0)]
    gpu_proof.prove(chosen, "cpu", context.out, 1.0, start)
    assert given[0] == 30.0 and 50.0 < given[1] <= 60.0
    (none,) = gpu_proof.prove(chosen[:1], "cpu", context.out, 0.0, start)
    assert (none.status, none.reason) == ("skipped", "not run: out of time") and len(given) == 2


@pytest.mark.parametrize(
    ("raised", "status", "reason"),
    [
        (None, "passed", ""),
        (AssertionError("3 of 4 differ"), "failed", "AssertionError: 3 of 4 differ"),
        (SystemExit("no"), "failed", "SystemExit: no"),
        (Skip("no nvcc"), "skipped", "no nvcc"),
    ],
)
def test_what_a_section_raises_is_its_outcome(
    context: Context, monkeypatch: pytest.MonkeyPatch, raised: BaseException | None, status: str, reason: str
) -> None:
    def function(_: Context) -> dict[str, Any]:
        if raised is not None:
            raised.__traceback__ = None
            raise raised
        return {"figures": 3}

    monkeypatch.setattr(Section, "load", lambda self: function)
    outcome = sections.run(Section("one", "", 1.0), context)
    assert (outcome.status, outcome.reason) == (status, reason)
    assert outcome.details == ({"figures": 3} if raised is None else {})


def test_a_section_runs_in_a_process_of_its_own_and_leaves_its_outcome(context: Context) -> None:
    (section,) = sections.choose(["ncu"])
    outcome = gpu_proof.run_in_process(section, context)
    assert (outcome.status, outcome.reason) == ("skipped", "hardware counters need a GPU")
    assert json.loads((context.out / "proof" / "ncu.json").read_text())["section"] == "ncu"


def test_a_process_that_hangs_or_dies_is_a_failure(context: Context) -> None:
    (section,) = sections.choose(["large_index"])
    late = gpu_proof.run_in_process(section, Context("cpu", context.out, 0.3))
    assert late.status == "failed" and late.reason.startswith("ended after 0 s") and late.seconds < 10
    dead = gpu_proof.run_in_process(Section("unknown", "", 30.0), context)
    assert dead.status == "failed" and dead.reason.startswith("died with exit status 2")


def test_sections_use_the_built_library_while_its_sources_are_those_at_hand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root, built = tmp_path / "root", tmp_path / "root" / "build"
    monkeypatch.setattr(layout, "ROOT", root)
    monkeypatch.setattr(layout, "BUILT", built)
    (root / "csrc").mkdir(parents=True)
    (root / "CMakeLists.txt").write_text("project")
    (root / "csrc" / "op.cpp").write_text("one")
    package = root / "kernels" / "llm2clip_kernels"
    package.mkdir(parents=True)
    (package / "old.py").write_text("")
    (package / "_C.so").write_text("shipped")
    assert not layout.refresh() and str(built) not in layout.python_path("graph")
    copied = layout.copy_package()
    assert not (copied / "_C.so").exists()
    (copied / "_C.so").write_text("built")
    layout.mark_built()
    (package / "old.py").rename(package / "new.py")
    assert layout.refresh() and (copied / "_C.so").read_text() == "built"
    assert [path.name for path in copied.glob("*.py")] == ["new.py"]
    assert layout.python_path("graph").startswith(str(built))
    assert str(built) not in layout.python_path("library")
    (root / "csrc" / "op.cpp").write_text("two")
    assert not layout.refresh() and not built.exists() and str(built) not in layout.python_path("graph")


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        gpu_proof.main([])
    with pytest.raises(SystemExit):
        gpu_proof.main(["--device", "cpu", "--sections", "nonsense"])


def test_the_whole_script_leaves_one_folder_and_an_archive(tmp_path: Path) -> None:
    out, archive = tmp_path / "out", tmp_path / "all.zip"
    gpu_proof.main(
        ["--device", "cpu", "--sections", "contrastive", "--out", str(out), "--archive", str(archive)]
    )
    (machine,) = out.iterdir()
    names = {path.relative_to(machine).as_posix() for path in machine.rglob("*") if path.is_file()}
    assert names >= {
        "similarity_float32_random.json",
        "similarity_float32_random.csv",
        "similarity_float32_random.svg",
        "proof/contrastive.json",
        "proof/proof.json",
        "proof/summary.txt",
        "proof/logs/contrastive.log",
    }
    assert archive.stat().st_size > 1000


# --- the checks pass on what is right and fail on what is not ---------------------------------------------------


def compute_case(function: Callable[[], list[Tensor]]) -> dict[str, Any]:
    return {"spoiled": ((), lambda device, dtype: function)}


@pytest.mark.parametrize("check", [checks.determinism, checks.graph, checks.streams, checks.large_index])
def test_checks_pass_at_tiny_sizes(check: Callable[[Context], Any], context: Context) -> None:
    assert check(context)


def test_library_is_loaded_and_right(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    if not checks.native.available():
        with pytest.raises(Skip, match="no library"):
            checks.library(context)
        return
    assert checks.library(context)["running_on"] == torch.__version__
    monkeypatch.setattr(
        checks, "similarity_lse", lambda x, y, scale, **_: (torch.zeros(len(x)), torch.zeros(len(y)))
    )
    with pytest.raises(AssertionError, match="similarity_lse is wrong"):
        checks.library(context)


@pytest.mark.parametrize("check", [checks.determinism, checks.graph])
def test_results_that_change_are_found(
    check: Callable[[Context], Any], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "CASES", compute_case(lambda: [torch.randn(3)]))
    with pytest.raises(AssertionError, match="spoiled"):
        check(context)


def test_a_result_of_the_wrong_thread_is_found(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    here = threading.current_thread()
    monkeypatch.setattr(
        cases,
        "CASES",
        compute_case(lambda: [torch.tensor(float(threading.current_thread() is here))]),
    )
    with pytest.raises(AssertionError, match="another stream: spoiled"):
        checks.streams(context)


@pytest.mark.parametrize("spoiled", ["row", "col", "dx"])
def test_an_index_that_wraps_is_found(
    spoiled: str, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = checks.similarity_lse

    def wrapped(x: Tensor, y: Tensor, scale: float, **more: Any) -> tuple[Tensor, Tensor]:
        row, col = right(x, y, scale, **more)
        if spoiled == "dx":
            # the last rows' gradient is that of others
            row, col = row.clone(), col
            row.register_hook(lambda gradient: torch.cat([gradient[:-2], 0 * gradient[-2:]]))
        last = torch.zeros_like(row if spoiled == "row" else col)
        last[-1] = 1.0
        return (
            (row + last, col) if spoiled == "row" else (row, col + last) if spoiled == "col" else (row, col)
        )

    monkeypatch.setattr(checks, "similarity_lse", wrapped)
    with pytest.raises(AssertionError, match="row_lse"):
        checks.large_index(context)


def test_cases_have_gradients_of_every_input() -> None:
    for name, make in cases.available().items():
        for tensor in make("cpu", torch.float32)():
            if tensor.is_floating_point():
                assert tensor.isfinite().all() and tensor.abs().sum() > 0, name


# --- tools and figures ------------------------------------------------------------------------------------------


def test_reads_what_pytest_and_the_sanitizer_say(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="t" name="a"/>'
        '<testcase classname="t" name="b"><failure/></testcase>'
        '<testcase classname="t" name="c"><error/></testcase>'
        '<testcase classname="t" name="d"><skipped/></testcase></testsuite></testsuites>'
    )
    assert tools.read_junit(report) == {"passed": 1, "failed": 2, "skipped": 1, "failures": ["t::b", "t::c"]}
    assert tools.findings("x\n========= ERROR SUMMARY: 0 errors\n") == 0
    assert tools.findings("========= ERROR SUMMARY: 17 errors") == 17
    assert tools.findings("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)") == 3
    assert tools.findings("Error: device not supported") == -1
    assert tools.last_line("Traceback\n  at\nValueError: no\n\n") == "ValueError: no"


def test_a_missing_tool_is_skipped_with_its_name() -> None:
    with pytest.raises(Skip, match="no-such-tool is neither on PATH"):
        tools.find_tool("no-such-tool")


def test_architectures_have_their_own_instructions() -> None:
    assert [build.architecture(*c) for c in ((8, 0), (9, 0), (10, 0))] == ["80-real", "90a-real", "100a-real"]


def test_targets_are_judged_by_the_measured_rows() -> None:
    def row(provider: str, n: int, **more: Any) -> dict[str, Any]:
        return {"provider": provider, "n": n, "d": 768, **more}

    judged = speed.judge(
        [
            row("mm", 32768, median_ms=2.1, time_over_recompute=0.2),
            row("recompute", 32768, median_ms=12.0, time_over_recompute=1.0),
            row("inf_cl", 32768, median_ms=240.0, time_over_recompute=20.0),
            row("open_clip", 32768, median_ms=24.0, time_over_recompute=2.0),
            row("eager", 8192, median_ms=2.0, time_over_recompute=1.2),
            row("eager", 2048, median_ms=2.0, time_over_recompute=0.5),
            row("recompute", 131072, median_ms=200.0, peak_mib=900.0),
            row("liger", 32768, not_timed="wrong result"),
        ]
    )
    assert {entry["what"]: (entry["target"], entry["met"]) for entry in judged} == {
        "ms at N=32768, D=768": (12.1, True),
        "ms at N=131072, D=768": (194.0, False),
        "MiB at N=131072, D=768": (1024.0, True),
        "times faster than inf_cl at N=32768, D=768": (10.0, True),
        "times faster than open_clip at N=32768, D=768": (2.5, False),
        "times faster than eager at N=8192, D=768": (1.0, True),
    }


def test_targets_of_the_stages_are_judged_by_the_measured_rows() -> None:
    lora = {
        "t": 8192,
        "k": 4096,
        "n": 4096,
        "r": 16,
        "step_peft_over_ours": 1.3,
        "forward_base_over_ours": 0.9,
    }
    judged = suites.judge(
        {
            "lora": [lora, lora | {"t": 1024, "step_peft_over_ours": 1.0}],
            "adapter_bfloat16": [
                {"provider": "eager", "saved_kib": 100.0},
                {"provider": "ours", "saved_kib": 49.0, "gemm_ratio": 1.2},
            ],
            "llm_step_bf16": [{"provider": "packed", "over_peft_padded": 2.1}],
            "embed_llama3-8b_bf16": [{"provider": "packed", "phase": "best", "mfu_percent": 44.0}],
            "clip_loop_vit-l-14_bf16": [{"provider": "ours", "loop_mfu": 0.51}],
        }
    )
    assert {row["what"]: row["met"] for row in judged} == {
        "LoRA: step of peft over ours": True,
        "LoRA: base GEMM over ours, forward": False,
        "adapter: time over its GEMMs": False,
        "adapter: saved activations over eager's": True,
        "LLM step: speed over peft with padding": True,
        "embedding with 8B's shape: MFU, %": False,
        "CLIP stage, batch 32,768: MFU": True,
    }


def test_missed_targets_of_the_stages_are_a_failure(context: Context) -> None:
    rows = [{"provider": "packed", "over_peft_padded": 1.5}]
    (context.out / "llm_step_bf16.json").write_text(json.dumps({"rows": rows}))
    with pytest.raises(AssertionError, match="1 of 1 missed: LLM step: speed over peft with padding: 1.5"):
        suites.stage_targets(context)
    with pytest.raises(AssertionError, match="nothing was measured"):
        suites.stage_targets(Context("cuda", context.out / "proof"))


def test_every_suite_takes_the_arguments_of_its_section(
    context: Context, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [*suites.PROJECTIONS, *suites.CAPTIONS, *suites.LARGE_LLM, *suites.CLIP_STAGE]
    for name, arguments in chosen:
        with pytest.raises(SystemExit):
            importlib.import_module(f"benchmarks.{name}").main([*arguments, "--no-such-option"])
        assert capsys.readouterr().err.endswith("unrecognized arguments: --no-such-option\n"), name
    for section in (
        suites.siblings,
        suites.projections,
        suites.captions,
        suites.large_llm,
        suites.clip_stage,
    ):
        assert section(context)["imported"]


def test_ceilings_are_saved_with_their_rates(context: Context) -> None:
    speed.ceilings(context)
    (path,) = context.out.parent.rglob("ceilings.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["op"] for row in rows} >= {"mm N·D·N", "copy from memory", "copy within L2"}
    product = next(row for row in rows if row["op"] == "mm N·D·N" and row["n"] == 512)
    assert product["tflops"] == pytest.approx(2 * 512**2 * 64 / product["median_ms"] / 1e9, abs=0.006)


@pytest.fixture(autouse=True)
def committed_results_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections that save in this process set the results folder; it is put back."""
    monkeypatch.setattr(speed.record, "RESULTS", speed.record.RESULTS)
