"""The command line: help, exit statuses, printed settings, a light import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm2clip.cli import main
from llm2clip.config import load_settings
from llm2clip.settings import EmbedSettings, EvaluateSettings, FinetuneLLMSettings, TrainSettings

CONFIGURED = {
    "finetune-llm": FinetuneLLMSettings,
    "embed": EmbedSettings,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
}
COMMANDS = [
    [],
    *([name] for name in (*CONFIGURED, "export", "search", "plan", "demo", "data", "store", "env")),
    *(["data", name] for name in ("cataclysm", "openstax", "check")),
    *(["store", name] for name in ("info", "verify", "repair", "convert")),
]


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(root / "kernels"), str(root)])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": paths}, **options,
    )  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "alone")
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: llm2clip") and len(shown.splitlines()) > 3
    for name in COMMANDS[1:9]:
        assert command or name[0] in shown


@pytest.mark.parametrize(
    "command",
    [
        ["trian"],
        [],
        ["data"],
        ["data", "chekc"],
        ["env", "more"],
        ["train", "--confg=a"],
        ["train", "a=1", "--x", "b=2"],
    ],
)
def test_unknown_commands(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("name", CONFIGURED)
def test_printed_settings_give_the_same_settings(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["data.val=[a.tar, b.tar]", "data.captions.translations.es=es.alt", "data.limit=5"]
    assert main([name, *overrides, "--print-config"]) == 0
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    settings: Any = load_settings(CONFIGURED[name], tmp_path / "a.yaml")
    assert settings == load_settings(CONFIGURED[name], None, overrides) != CONFIGURED[name]()
    assert main([name, "--config", str(tmp_path / "a.yaml"), "--print-config", "data.limit=6"]) == 0
    assert "limit: 6" in capsys.readouterr().out


def test_overrides_and_options_may_mix(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "optim.lr=0.5", "--print-config", "run.steps=7"]) == 0
    shown = capsys.readouterr().out
    assert "lr: 0.5" in shown and "steps: 7" in shown


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "optim.lrr=1"], "unknown setting optim.lrr; did you mean optim.lr?"),
        (["train", "--config", "none.yaml"], "config file none.yaml does not exist"),
        (["train"], "run.out: expected the directory"),
        (["finetune-llm", "run.out=x"], "data.train: expected at least one source"),
        (["embed"], "out is empty"),
        (["evaluate"], "out is empty"),
        (["data", "check", "none.tar"], "none.tar"),
        (["demo", "--data", "none"], "DATA=none: expected `cataclysm` or a directory"),
        (["train", "run.device=tpu", "run.out=x"], "device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["train", "run.device=cpu", "run.out=x", "data.train=none.tar", "store=missing"], "missing"),
    ],
)
def test_errors_are_one_message_and_status_2(
    command: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    captured = capsys.readouterr()
    (error,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert message in captured.err and captured.err.index(error) <= captured.err.index(message)
    assert "Traceback" not in captured.err and captured.out == ""


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("llm2clip.environment.environment", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["env"])


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["env", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["packages"]["torch"] == torch.__version__ and info["cores"] >= 1
    assert {"kernels", "python", "processor", "gpu"} <= set(info) and info["kernels"]
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown and "kernels" in shown and "{" not in shown
    assert all(len(line) < 400 for line in shown.splitlines())


def test_as_a_module_with_its_exit_status(tmp_path: Path) -> None:
    done = python("-m", "llm2clip", "train", "optim.lr=x", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: optim.lr: expected number, got 'x'\n"
    done = python("-m", "llm2clip", "train", "--print-config", "run.out=here", cwd=tmp_path)
    assert done.returncode == 0 and "out: here" in done.stdout and done.stderr == ""
    assert os.listdir(tmp_path) == []


def test_the_import_is_light() -> None:
    code = (
        "import sys, time; start = time.process_time(); import llm2clip, llm2clip.cli, llm2clip.settings;"
        "seconds = time.process_time() - start;"
        "heavy = sorted({'torch', 'transformers', 'peft', 'triton', 'pyarrow', 'PIL', 'numpy'} & set(sys.modules));"
        "print(seconds, *heavy)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    seconds, *heavy = done.stdout.split()
    # processor time: other work on the machine does not count
    assert float(seconds) < 2.0 and heavy == []
