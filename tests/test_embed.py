"""The embedding job: what it collects, that it goes on after a stop, and its ranks."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm2clip.data.caption_stream import CaptionStream, take_census
from llm2clip.data.store import EmbeddingStore, StoreWriter, caption_digest, verify_store
from llm2clip.embed import embed
from llm2clip.errors import ConfigError, DataError, StoreError
from llm2clip.progress import Progress
from llm2clip.settings import CaptionSettings, DataSettings, EmbedSettings


class HashEncoder:
    """An encoder whose embedding only the text decides; it can fail after some captions."""

    def __init__(self, dim: int = 12, fail_after: int | None = None, name: str = "hash") -> None:
        self.dim, self.truncated, self.encoded = dim, 0, 0
        self._fail_after, self._name = fail_after, name

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        return self.encode_tokens(self.tokenize(texts))

    def tokenize(self, texts: Sequence[str]) -> Sequence[str]:
        return texts

    def encode_tokens(
        self, tokens: Sequence[str], *, token_budget: int | None = None, progress: Progress | None = None
    ) -> torch.Tensor:
        texts = tokens
        self.encoded += len(texts)
        if self._fail_after is not None and self.encoded > self._fail_after:
            raise KeyboardInterrupt
        self.truncated += sum(len(text) > 30 for text in texts)
        if progress is not None:
            progress.update(len(texts))
        rows = [np.random.default_rng(list(caption_digest(text))).standard_normal(self.dim) for text in texts]
        return torch.tensor(np.array(rows), dtype=torch.float32)

    def fingerprint(self) -> dict[str, Any]:
        return {"encoder": self._name}


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def make_settings(tmp_path: Path, count: int = 30) -> EmbedSettings:
    train = [
        {"caption": f"short {i}", "alt": f"long text {i // 2}", "es": {"caption": f"corto {i}"}}
        for i in range(count)
    ]
    val = [
        {"caption": f"held out {i}", "alt": f"a caption that is longer than thirty letters {i}",
         "es": {"caption": f"aparte {i}"}, "de": {"caption": f"unused {i}"}}
        for i in range(4)
    ]  # fmt: skip
    data = DataSettings(
        train=(write_jsonl(tmp_path / "train.jsonl", train),),
        val=(write_jsonl(tmp_path / "val.jsonl", val),),
        captions=CaptionSettings(translations={"es": "es.caption"}),
    )
    return EmbedSettings(
        data=data, out=str(tmp_path / "store"), dtype="fp32", shard_rows=32, commit_rows=8, device="cpu"
    )


EXPECTED = (
    [f"short {i}" for i in range(30)]
    + [f"long text {i}" for i in range(15)]
    + [f"held out {i}" for i in range(4)]
    + [f"a caption that is longer than thirty letters {i}" for i in range(4)]
    + [f"aparte {i}" for i in range(4)]
)


def test_collects_each_caption_once_and_translations_of_val_alone(tmp_path: Path) -> None:
    data = make_settings(tmp_path).data
    census = take_census(CaptionStream(data), data.captions)
    assert {row.tobytes() for row in census.own} == set(map(caption_digest, EXPECTED))
    assert len(census.own) == len(EXPECTED) and census.captions == 60 + 12 and census.bad == 0


def test_embeds_every_caption_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = make_settings(tmp_path)
    encoder = HashEncoder()
    store = embed(settings, encoder)
    assert store.complete and len(store) == len(EXPECTED) == encoder.encoded
    assert torch.equal(store.get(EXPECTED), HashEncoder().encode(EXPECTED))
    summary = json.loads((tmp_path / "store" / "embed.json").read_text())
    assert (summary["captions"], summary["unique"], summary["embedded"], summary["truncated"]) == (
        72,
        57,
        57,
        4,
    )
    assert "57 embedded now" in capsys.readouterr().err


def test_goes_on_after_an_interruption_and_computes_nothing_twice(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        embed(settings, HashEncoder(fail_after=30))
    unfinished = EmbeddingStore.open(settings.out)
    assert not unfinished.complete and 16 <= len(unfinished) <= 30
    encoder = HashEncoder()
    store = embed(settings, encoder)
    assert encoder.encoded == len(EXPECTED) - len(unfinished)
    assert torch.equal(store.get(EXPECTED), HashEncoder().encode(EXPECTED))
    again = HashEncoder()
    embed(settings, again)
    assert again.encoded == 0


def test_a_lost_shard_is_computed_again_and_nothing_else(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    embed(settings, HashEncoder())
    shard = Path(settings.out) / "shard-000001.safetensors"
    shard = shard if shard.exists() else sorted(Path(settings.out).glob("shard-*"))[-1]
    rows = next(
        e["rows"]
        for e in json.loads((shard.parent / "index.json").read_text())["shards"]
        if e["file"] == shard.name
    )
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    encoder = HashEncoder()
    embed(settings, encoder)
    assert encoder.encoded == 0  # the checksum is only compared when asked for
    store = embed(replace(settings, verify=True), encoder)
    assert encoder.encoded == rows < len(EXPECTED)
    shard.unlink(missing_ok=True)
    assert torch.equal(embed(settings, encoder).get(EXPECTED), HashEncoder().encode(EXPECTED))
    assert len(store) == len(EXPECTED)


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    embed(settings, HashEncoder())
    with pytest.raises(StoreError, match="encoder: stored 'hash', expected 'other'"):
        embed(settings, HashEncoder(name="other"))


def test_bad_settings_are_named(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    with pytest.raises(ConfigError, match="out is empty"):
        embed(replace(settings, out=""), HashEncoder())
    with pytest.raises(ConfigError, match="both empty"):
        embed(replace(settings, data=DataSettings()), HashEncoder())
    captions = CaptionSettings(short=("name",), long=("story",))
    with pytest.raises(DataError, match="name, story"):
        embed(replace(settings, data=replace(settings.data, captions=captions)), HashEncoder())


def test_a_write_that_fails_ends_the_job_and_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(tmp_path)
    original, calls = StoreWriter.add, iter(range(10**6))

    def add(self: StoreWriter, texts: Sequence[str], embeddings: torch.Tensor) -> None:
        if next(calls) == 2:
            raise OSError("no room")
        original(self, texts, embeddings)

    monkeypatch.setattr(StoreWriter, "add", add)
    with pytest.raises(OSError, match="no room"):
        embed(settings, HashEncoder())
    # two of eight windows over 57 captions
    assert len(EmbeddingStore.open(settings.out)) == 8 + 8
    monkeypatch.undo()
    assert torch.equal(embed(settings, HashEncoder()).get(EXPECTED), HashEncoder().encode(EXPECTED))


def test_captions_that_vanish_are_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(tmp_path)
    right = CaptionStream.read
    passes = iter(range(10))

    def read(self: CaptionStream, **options: bool) -> Iterator[str]:
        texts = right(self, **options)
        return itertools.islice(texts, 20) if next(passes) == 1 else texts

    monkeypatch.setattr(CaptionStream, "read", read)
    with pytest.raises(DataError, match="were not found again"):
        embed(settings, HashEncoder())
    assert not EmbeddingStore.open(settings.out).complete
    monkeypatch.undo()
    assert torch.equal(embed(settings, HashEncoder()).get(EXPECTED), HashEncoder().encode(EXPECTED))


class SlowEncoder(HashEncoder):
    """Notes in which order windows are tokenised and computed."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.ahead = threading.Event()

    def tokenize(self, texts: Sequence[str]) -> Sequence[str]:
        self.events.append("tokenize")
        if self.events.count("tokenize") == 2:
            self.ahead.set()
        return super().tokenize(texts)

    def encode_tokens(self, tokens: Sequence[str], **options: Any) -> torch.Tensor:
        # the first window does not end before the second one is tokenised
        assert self.ahead.wait(timeout=60)
        return super().encode_tokens(tokens, **options)


def test_the_next_window_is_tokenised_while_one_is_computed(tmp_path: Path) -> None:
    encoder = SlowEncoder()
    store = embed(make_settings(tmp_path), encoder)
    assert torch.equal(store.get(EXPECTED), HashEncoder().encode(EXPECTED))


RANKED = """
    import sys
    sys.path[:0] = [{root!r}, {kernels!r}, {tests!r}]
    from pathlib import Path
    from test_embed import HashEncoder, make_settings
    from llm2clip.embed import embed
    embed(make_settings(Path({path!r})), HashEncoder())
"""


@pytest.mark.dist
def test_ranks_share_the_work_and_leave_one_store(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    settings = make_settings(tmp_path)
    # a rank store that a killed run left behind
    embed(
        replace(settings, out=f"{settings.out}/rank-007", data=replace(settings.data, limit=5)), HashEncoder()
    )
    code = RANKED.format(
        root=str(root), kernels=str(root / "kernels"), tests=str(root / "tests"), path=str(tmp_path)
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(3):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        processes.append(
            subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=env, stderr=subprocess.PIPE)
        )
    logs = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], logs
    store = EmbeddingStore.open(settings.out)
    assert store.complete and len(store) == len(EXPECTED) and verify_store(settings.out).ok
    assert torch.equal(store.get(EXPECTED), HashEncoder().encode(EXPECTED))
    assert not list(Path(settings.out).glob("rank-*"))
