"""Settings from YAML and overrides: names, types, round trips, and the reference page made of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llm2clip.config import dump_yaml, from_tree, iter_fields, load_settings, to_tree, type_name
from llm2clip.errors import ConfigError
from llm2clip.reference import COMMANDS, PAGE, render
from llm2clip.settings import (
    EmbedSettings,
    EvaluateSettings,
    FinetuneLLMSettings,
    OptimSettings,
    PlanSettings,
    RunSettings,
    TrainSettings,
)


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_round_trip(command: type, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(dump_yaml(command()))
    assert load_settings(command, tmp_path / "a.yaml") == command()
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_settings(command, tmp_path / "empty.yaml") == command() == load_settings(command)


TEXT = st.text(max_size=12)
RATE = st.floats(0, 1e6, allow_nan=False)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    lr=RATE,
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    scales=st.dictionaries(TEXT, RATE, max_size=3),
    steps=st.none() | st.integers(0, 10**9),
    batch=st.integers(1, 10**9),
    out=TEXT,
    paths=st.lists(TEXT, max_size=3),
    translations=st.dictionaries(TEXT, TEXT, max_size=3),
    resume=st.booleans(),
)
def test_any_values_round_trip(
    lr: float, betas: Any, scales: Any, steps: Any, batch: int, out: str, paths: Any, translations: Any, resume: bool
) -> None:  # fmt: skip
    start = TrainSettings()
    settings = replace(
        start,
        optim=OptimSettings(lr=lr, betas=betas, lr_scales=scales),
        run=RunSettings(steps=steps, batch_size=batch, out=out, resume=resume),
        data=replace(
            start.data, train=tuple(paths), captions=replace(start.data.captions, translations=translations)
        ),
    )
    assert from_tree(TrainSettings, yaml.safe_load(dump_yaml(settings))) == settings
    assert from_tree(TrainSettings, to_tree(settings)) == settings


@given(st.floats(allow_nan=False, min_value=0, max_value=1e300))
def test_a_number_means_itself_in_an_override(value: float) -> None:
    assert load_settings(TrainSettings, None, [f"optim.lr={value!r}"]).optim.lr == value


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("optim.lr=1e-3", lambda s: s.optim.lr, 1e-3),  # YAML alone reads this as text
        ("optim.lr=3", lambda s: s.optim.lr, 3.0),
        ("run.steps=null", lambda s: s.run.steps, None),
        ("run.steps=", lambda s: s.run.steps, None),
        ("data.train=[a.tar, b.tar]", lambda s: s.data.train, ("a.tar", "b.tar")),
        ("data.train=a-{000000..000003}.tar", lambda s: s.data.train, ("a-{000000..000003}.tar",)),
        ("data.weights=[1, 2e-1]", lambda s: s.data.weights, (1.0, 0.2)),
        ("optim.betas=[0.5, 0.6]", lambda s: s.optim.betas, (0.5, 0.6)),
        ("data.captions.translations.es=es.alt", lambda s: s.data.captions.translations, {"es": "es.alt"}),
        ("data.captions.probabilities={short: 1, long: 3}", lambda s: s.data.captions.probabilities,
         {"short": 1.0, "long": 3.0}),
        ("run.out=a=b", lambda s: s.run.out, "a=b"),
        ("run.tensorboard=true", lambda s: s.run.tensorboard, True),
        ("run.precision=bf16", lambda s: s.run.precision, "bf16"),
    ],
)  # fmt: skip
def test_overrides(override: str, read: Any, value: Any) -> None:
    found = read(load_settings(TrainSettings, None, [override]))
    assert found == value and type(found) is type(value)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("optim: {lr: 0.5, eps: 1.0e-6}\nrun: {out: here}\n")
    settings = load_settings(TrainSettings, tmp_path / "a.yaml", ["optim.lr=0.25", "optim.lr=0.125"])
    assert (settings.optim.lr, settings.optim.eps, settings.run.out) == (0.125, 1e-6, "here")
    (tmp_path / "b.yaml").write_text("optim:\nrun:\n")
    assert load_settings(TrainSettings, tmp_path / "b.yaml", ["optim.lr=2"]).optim.lr == 2.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"unknown setting optim\.lrr; did you mean optim\.lr\?"),
        ("run.batchsize=1", r"did you mean run\.batch_size\?"),
        ("optm.lr=1", r"unknown setting optm; did you mean optim\?"),
        ("model.vision.image=1", r"did you mean model\.vision\.image_size\?"),
        ("run.zzz=1", r"unknown setting run\.zzz; known here: out, steps"),
        ("run.steps=many", r"run\.steps: expected integer or null, got 'many'"),
        ("run.steps=1.5", r"run\.steps: expected integer or null, got 1\.5"),
        ("run.steps=true", r"run\.steps: expected integer or null, got True"),
        ("optim.lr=fast", r"optim\.lr: expected number, got 'fast'"),
        ("optim.lr=true", r"optim\.lr: expected number, got True"),
        ("optim.betas=[0.9]", r"optim\.betas: expected list of 2 numbers, got \[0\.9\]"),
        ("optim.betas=[0.9, x]", r"optim\.betas\[1\]: expected number, got 'x'"),
        ("optim.lr_scales.vision=x", r"optim\.lr_scales\.vision: expected number, got 'x'"),
        ("optim.lr_scales=3", r"optim\.lr_scales: expected mapping of text to number, got 3"),
        ("run.tensorboard=1", r"run\.tensorboard: expected true or false, got 1"),
        ("run.precision=fp8", r"run\.precision: expected fp32 \| bf16 \| fp16 \| auto, got 'fp8'"),
        ("run.out=5", r"run\.out: expected text, got 5"),
        ("run=5", r"run: expected a group of settings, got 5"),
        ("optim.schedule=[cosine]", r"optim\.schedule: expected cosine \| constant"),
        ("run.steps", r"override 'run\.steps': expected name=value"),
        ("=5", r"expected name=value"),
        ("run.out=[", r"the value is not YAML"),
        ("run.batch_size=0", r"run\.batch_size: expected at least 1, got 0"),
        ("run.log_every=0", r"run\.log_every: expected at least 1"),
        ("run.save_every=-1", r"run\.save_every"),
        ("run.steps=-1", r"run\.steps: expected at least 0, got -1"),
        ("run.micro_batch=-4", r"run\.micro_batch"),
        ("run.epochs=nan", r"run\.epochs: expected at least 0, got nan"),
    ],
)
def test_what_is_refused_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(TrainSettings, None, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: [}", r"a\.yaml is not YAML"),
        ("- 1\n- 2\n", r"a\.yaml: expected `name: value` lines, got a list"),
        ("optim: fast\n", r"optim \(.*a\.yaml\): expected a group of settings, got 'fast'"),
        ("optim: {lrr: 1}\n", r"unknown setting optim\.lrr \(.*a\.yaml\)"),
        ("5: 1\n", r"unknown setting 5"),
        ("data: {train: {a: b}}\n", r"data\.train .*: expected list of text"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(FinetuneLLMSettings, tmp_path / "a.yaml")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_settings(EmbedSettings, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(EmbedSettings, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(EmbedSettings, tmp_path / "binary.yaml")


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("run: !!python/object/apply:os.system ['exit 3']\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_settings(EvaluateSettings, tmp_path / "a.yaml")


def test_every_setting_has_a_help_text_and_a_typed_name() -> None:
    for command in COMMANDS:
        for name, kind, _, text in iter_fields(command):
            assert len(text) > 5, name
            assert "class" not in type_name(kind) and "typing" not in type_name(kind), name


@dataclass(frozen=True)
class Odd:
    x: int | None = None


def test_type_names() -> None:
    ((_, kind, default, _),) = list(iter_fields(Odd))
    assert (type_name(kind), default) == ("integer or null", None)
    assert type_name(tuple[str, ...]) == "list of text" and type_name(dict[str, float]).endswith("to number")


def test_the_reference_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render()
    done = subprocess.run(
        [sys.executable, "-m", "llm2clip.reference", "--check"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line for line in render().splitlines() if line.startswith("| `")]
    # a plan takes the settings of three commands, and shows them as one row each
    stages = ("finetune.", "embed.", "train.")
    own = [name for name, *_ in iter_fields(PlanSettings) if not name.startswith(stages)]
    others = [command for command in COMMANDS if command is not PlanSettings]
    assert len(rows) == sum(len(list(iter_fields(command))) for command in others) + len(own) + len(stages)
    assert all(line.replace("\\|", "").count("|") == 5 for line in rows)
