"""Which settings of a run directory count as changed when the run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from llm2clip.config import dump_yaml, to_tree
from llm2clip.settings import FinetuneLLMSettings
from llm2clip.training.directory import CONFIG, changed_settings


def test_settings_that_an_earlier_version_did_not_have_had_their_default(tmp_path: Path) -> None:
    settings = FinetuneLLMSettings()
    tree = to_tree(settings)
    del tree["token_budget"], tree["lora"]["fused"], tree["llm"]["layout"]
    (tmp_path / CONFIG).write_text(yaml.safe_dump(tree))
    assert changed_settings(tmp_path, settings) == []
    other = replace(settings, token_budget=512, lora=replace(settings.lora, fused="off"))
    assert sorted(changed_settings(tmp_path, other)) == ["lora.fused: auto -> off", "token_budget: 0 -> 512"]


def test_changes_and_what_may_differ_freely(tmp_path: Path) -> None:
    settings = FinetuneLLMSettings()
    (tmp_path / CONFIG).write_text(dump_yaml(settings))
    run = replace(settings.run, micro_batch=3, seed=settings.run.seed + 1)
    changed = changed_settings(tmp_path, replace(settings, run=run))
    assert changed == [f"run.seed: {settings.run.seed} -> {settings.run.seed + 1}"]
    assert changed_settings(tmp_path / "nothing", settings) == []
