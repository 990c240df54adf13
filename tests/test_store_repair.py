"""Damage is located to blocks of rows, only those are made again; stores are written again in another form."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from llm2clip.cli import main
from llm2clip.data import store_writer
from llm2clip.data.store import EmbeddingStore, StoreWriter, repair_store, verify_store
from llm2clip.data.store_format import BLOCK_ROWS, BlockChecks, StoreIndex, wrong_blocks
from llm2clip.data.store_lookup import caption_digest
from llm2clip.data.store_repair import convert_store
from llm2clip.data.tensorfile import tensor_layout
from llm2clip.errors import StoreError

FINGERPRINT = {"weights": "abc", "dim": 6}


def names_of(count: int, start: int = 0) -> list[str]:
    return [f"caption {number}" for number in range(start, start + count)]


def vectors(names: list[str], dim: int = 6) -> torch.Tensor:
    rows = [np.frombuffer(caption_digest(name), np.uint8)[:dim] for name in names]
    return torch.from_numpy(np.array(rows, np.float32).reshape(len(names), dim)) / 16 - 8


def build(path: Path, names: list[str], dtype: str = "fp32", **options: int) -> EmbeddingStore:
    with StoreWriter(path, dim=6, dtype=dtype, fingerprint=FINGERPRINT, **options) as out:  # type: ignore[arg-type]
        out.add(names, vectors(names))
        out.finish()
    return EmbeddingStore.open(path)


def flip(path: Path, tensor: str, row: int) -> None:
    """Turn one bit of a tensor's row."""
    spec, offset = tensor_layout(path)[tensor]
    data = bytearray(path.read_bytes())
    data[offset + row * (spec.nbytes // spec.shape[0])] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("sizes", [[2500], [1, 1023, 1024, 452], [700] * 3 + [400]])
def test_block_checks_do_not_depend_on_how_rows_come(sizes: list[int]) -> None:
    rows = np.random.default_rng(0).integers(0, 255, (2500, 5), dtype=np.uint8)
    tensors = {"embeddings": rows, "digests": rows[:, ::-1]}
    checks = BlockChecks(2500)
    for tensor in tensors.values():
        passed = list(checks.watch(np.split(tensor, np.cumsum(sizes)[:-1])))
        assert np.array_equal(np.concatenate(passed), tensor)
    tensors["checks"] = checks.values
    assert wrong_blocks(tensors, 2500).tolist() == []
    rows[2048] ^= 1
    rows[3] ^= 1
    assert wrong_blocks(tensors, 2500).tolist() == [0, 2]


@pytest.mark.parametrize("tensor", ["embeddings", "scales", "digests"])
def test_only_the_block_with_a_turned_bit_is_made_again(tmp_path: Path, tensor: str) -> None:
    names = names_of(7000)
    build(tmp_path, names, "int8", shard_rows=3500, commit_rows=500)
    expected = EmbeddingStore.open(tmp_path).get(names)
    shard = tmp_path / StoreIndex.load(tmp_path).shards[1].file
    flip(shard, tensor, 1500)
    report = verify_store(tmp_path)
    assert list(report.damaged) == [shard.name] and report.damaged[shard.name].rows == ((1024, 2048),)
    assert "rows 1024–2047 of this shard (1024 captions)" in str(report)
    assert verify_store(tmp_path, checksums=False).ok
    generation = StoreIndex.load(tmp_path).generation
    assert repair_store(tmp_path).damaged.keys() == report.damaged.keys()
    assert StoreIndex.load(tmp_path).generation == generation + 1
    assert not shard.exists() and verify_store(tmp_path).ok
    lost = names[3500 + 1024 : 3500 + 2048]
    with StoreWriter(tmp_path, dim=6, dtype="int8", fingerprint=FINGERPRINT, shard_rows=3500) as out:
        assert out.missing(names) == lost
        out.add(lost, vectors(lost))
        out.finish()
    assert torch.equal(EmbeddingStore.open(tmp_path).get(names), expected)
    assert verify_store(tmp_path).ok


def test_damage_outside_the_rows_costs_no_row(tmp_path: Path) -> None:
    names = names_of(3000)
    build(tmp_path, names, shard_rows=3000)
    shard = tmp_path / StoreIndex.load(tmp_path).shards[0].file
    data = bytearray(shard.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    assert data[end - 1] == ord(" ")  # padding of the header
    data[end - 1] = ord("\n")
    shard.write_bytes(data)
    assert "every row does" in str(verify_store(tmp_path))
    reader = EmbeddingStore.open(tmp_path)
    repair_store(tmp_path)
    store = EmbeddingStore.open(tmp_path)
    assert store.complete and torch.equal(store.get(names), vectors(names)) and verify_store(tmp_path).ok
    assert torch.equal(pickle.loads(pickle.dumps(reader)).get(names), vectors(names))


def test_a_damaged_table_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "_TABLE_ROWS", 100)
    names = names_of(500)
    build(tmp_path, names)
    (table,) = tmp_path.glob("lookup-*")
    flip(table, "low", 7)
    assert list(verify_store(tmp_path).damaged) == [table.name]
    repair_store(tmp_path)
    assert not table.exists() and verify_store(tmp_path).ok and EmbeddingStore.open(tmp_path).complete
    assert torch.equal(build(tmp_path, names).get(names), vectors(names))
    assert list(tmp_path.glob("lookup-*")) != []


def test_a_store_of_version_1_is_read_and_gone_on_with(tmp_path: Path) -> None:
    names = names_of(40)
    build(tmp_path, names, shard_rows=40)
    # as version 1 wrote it: without checks and without the newer entries
    from safetensors.numpy import load_file, save_file

    shard = tmp_path / StoreIndex.load(tmp_path).shards[0].file
    tensors = load_file(shard)
    del tensors["checks"]
    save_file(tensors, shard)
    content = json.loads((tmp_path / "index.json").read_text())
    content = {k: v for k, v in content.items() if k not in ("generation", "lookup")} | {"version": 1}
    from llm2clip.files import sha256_file

    content["shards"][0] |= {"bytes": shard.stat().st_size, "sha256": sha256_file(shard)}
    (tmp_path / "index.json").write_text(json.dumps(content))
    assert verify_store(tmp_path).ok
    store = build(tmp_path, names_of(90))
    assert torch.equal(store.get(names_of(90)), vectors(names_of(90))) and verify_store(tmp_path).ok
    assert StoreIndex.load(tmp_path).shards[0].file == shard.name  # not written again
    flip(shard, "embeddings", 3)
    assert verify_store(tmp_path).damaged[shard.name].rows == ((0, 40),)


def test_a_reader_of_rows_that_moved_is_told(tmp_path: Path) -> None:
    store = build(tmp_path, names_of(3000), shard_rows=3000)
    state = pickle.dumps(store)
    flip(tmp_path / StoreIndex.load(tmp_path).shards[0].file, "embeddings", 0)
    repair_store(tmp_path)
    with pytest.raises(StoreError, match="was repaired while it was in use"):
        pickle.loads(state)


@pytest.mark.parametrize("dtype", ["fp16", "int8", "fp8"])
def test_a_store_in_another_precision_and_with_fewer_dimensions(tmp_path: Path, dtype: str) -> None:
    names = names_of(500)
    full = build(tmp_path / "full", names, shard_rows=128)
    convert_store(tmp_path / "full", tmp_path / "small", dtype=dtype, dim=4)  # type: ignore[arg-type]
    small = EmbeddingStore.open(tmp_path / "small")
    assert (small.dim, small.dtype, small.fingerprint["dim"], small.complete) == (4, dtype, 4, True)
    exact = full.get(names)[:, :4]
    bound = {"fp16": 1e-3, "int8": 1 / 254, "fp8": 1 / 16}[dtype] * exact.abs().amax(1, keepdim=True)
    assert ((small.get(names) - exact).abs() <= bound + 1e-6).all()
    assert verify_store(tmp_path / "small").ok
    # the same as embedding into that precision at once
    with StoreWriter(tmp_path / "direct", dim=4, dtype=dtype, fingerprint={}) as out:  # type: ignore[arg-type]
        out.add(names, exact)
        out.finish()
    assert torch.equal(EmbeddingStore.open(tmp_path / "direct").get(names), small.get(names))
    with pytest.raises(StoreError, match="begun with other settings"):
        convert_store(tmp_path / "full", tmp_path / "small", dtype="fp32")
    with pytest.raises(StoreError, match="the first 9 were asked for"):
        convert_store(tmp_path / "full", tmp_path / "other", dim=9)


def test_a_damaged_or_unfinished_store_is_not_converted(tmp_path: Path) -> None:
    build(tmp_path / "a", names_of(50))
    flip(tmp_path / "a" / StoreIndex.load(tmp_path / "a").shards[0].file, "embeddings", 0)
    with pytest.raises(StoreError, match="store repair"):
        convert_store(tmp_path / "a", tmp_path / "b")
    with StoreWriter(tmp_path / "c", dim=6, dtype="fp32", fingerprint={}):
        pass
    with pytest.raises(StoreError, match="unfinished"):
        convert_store(tmp_path / "c", tmp_path / "d")


def test_whole_shards_are_taken_over_without_a_copy(tmp_path: Path) -> None:
    names = names_of(250)
    build(tmp_path / "other", names[100:], shard_rows=64, commit_rows=16)
    shards = [tmp_path / "other" / entry.file for entry in StoreIndex.load(tmp_path / "other").shards]
    with StoreWriter(tmp_path / "main", dim=6, dtype="fp32", fingerprint=FINGERPRINT, shard_rows=64) as out:
        out.add(names[:110], vectors(names[:110]))  # ten of the other's captions are known already
        assert out.absorb(tmp_path / "other") == 140
        out.finish()
    inodes = {path.stat().st_ino for path in (tmp_path / "main").glob("shard-*")}
    assert [path.stat().st_ino in inodes for path in shards] == [False, True, True]
    store = EmbeddingStore.open(tmp_path / "main")
    assert torch.equal(store.get(names), vectors(names)) and verify_store(tmp_path / "main").ok
    assert len(store) == 250


def test_no_file_name_is_used_twice(tmp_path: Path) -> None:
    # a process that holds an older index would read other rows under a name that came again
    seen: dict[str, str] = {}
    for rounds in range(3):
        with StoreWriter(
            tmp_path, dim=6, dtype="fp32", fingerprint=FINGERPRINT, shard_rows=64, commit_rows=8
        ) as out:
            for start in range(rounds * 100, rounds * 100 + 100, 8):
                out.add(names_of(8, start), vectors(names_of(8, start)))
                for entry in StoreIndex.load(tmp_path).shards:
                    assert seen.setdefault(entry.file, entry.sha256) == entry.sha256
        flip(tmp_path / StoreIndex.load(tmp_path).shards[-1].file, "embeddings", 0)
        repair_store(tmp_path)
    assert len(seen) > 36


def _read_while_it_grows(path: Path, failures: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    try:
        chance = random.Random(os.getpid())
        names = names_of(800)
        first: EmbeddingStore | None = None
        while True:
            store = EmbeddingStore.open(path)
            first = first if first is not None and len(first) else store
            asked = [chance.choice(names) for _ in range(50)]
            rows = store.find(asked)
            known = [name for name, row in zip(asked, rows.tolist(), strict=True) if row >= 0]
            assert torch.equal(store.get(known), vectors(known))
            if store.complete:
                break
        # its parts were merged and removed long ago
        known = names[: len(first)]
        assert torch.equal(first.get(known), vectors(known))
        assert torch.equal(pickle.loads(pickle.dumps(first)).get(known), vectors(known))
        failures.put("")
    except BaseException as problem:
        failures.put(f"{type(problem).__name__}: {problem}")


def test_eight_processes_read_while_one_writes(tmp_path: Path) -> None:
    names = names_of(800)
    # fork: eight imports of torch would take longer than all the rest
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    with StoreWriter(
        tmp_path, dim=6, dtype="fp32", fingerprint=FINGERPRINT, shard_rows=64, commit_rows=8
    ) as out:
        readers = [context.Process(target=_read_while_it_grows, args=(tmp_path, failures)) for _ in range(8)]
        for reader in readers:
            reader.start()
        for start in range(0, len(names), 32):
            out.add(names[start : start + 32], vectors(names[start : start + 32]))
            time.sleep(0.01)  # between commits, readers come to read
        out.finish()
    assert [failures.get(timeout=120) for _ in readers] == [""] * 8
    for reader in readers:
        reader.join(30)
    assert BLOCK_ROWS > 64 and not list(tmp_path.glob("part-*"))


def test_the_command_names_damage_and_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "s", names_of(3000), shard_rows=3000)
    assert main(["store", "info", str(tmp_path / "s")]) == 0
    shown = capsys.readouterr().out
    assert "3000 captions, dim 6, fp32, complete" in shown and "encoder weights: 'abc'" in shown
    assert main(["store", "info", "--json", str(tmp_path / "s")]) == 0
    assert json.loads(capsys.readouterr().out)["captions"] == 3000
    assert main(["store", "verify", str(tmp_path / "s")]) == 0
    shard = StoreIndex.load(tmp_path / "s").shards[0].file
    flip(tmp_path / "s" / shard, "embeddings", 2999)
    assert main(["store", "verify", "--quick", str(tmp_path / "s")]) == 0
    assert main(["store", "verify", str(tmp_path / "s"), "--json", str(tmp_path / "r.json")]) == 1
    shown = capsys.readouterr().out
    assert shard in shown and "rows 2048–2999" in shown and "llm2clip store repair" in shown
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["damaged"][shard]["rows"] == [[2048, 3000]] and not report["ok"]
    assert main(["store", "repair", str(tmp_path / "s")]) == 0
    assert "dropped 952 captions; run `llm2clip embed`" in capsys.readouterr().out
    assert len(EmbeddingStore.open(tmp_path / "s")) == 2048
    assert main(["store", "convert", str(tmp_path / "s"), str(tmp_path / "t"), "--dtype", "int8"]) == 2
    assert "unfinished" in capsys.readouterr().err
    assert main(["store", "verify", str(tmp_path / "nowhere")]) == 2


def test_the_command_embeds_again_what_was_lost_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm2clip.embed import embed
    from llm2clip.models import CaptionEncoder
    from llm2clip.settings import DataSettings, EmbedSettings, LLMSettings
    from tests.tiny_models import save_tiny

    records = [{"caption": f"s{n}", "alt": f"l{n}"} for n in range(1500)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    llm = save_tiny(tmp_path / "llm")
    store = embed(
        EmbedSettings(
            data=DataSettings(train=(str(data),)), llm=LLMSettings(path=str(llm), dim=8),
            out=str(tmp_path / "store"), device="cpu", dtype="fp8",
        )
    )  # fmt: skip
    assert store.dim == 8 and store.fingerprint["dim"] == 8
    names = [text for record in records for text in record.values()]
    expected = store.get(names)
    shard = tmp_path / "store" / StoreIndex.load(tmp_path / "store").shards[0].file
    flip(shard, "scales", 1100)
    encoded: list[int] = []
    right = CaptionEncoder.encode_tokens

    def counted(self: CaptionEncoder, tokens: list[object], **options: object) -> torch.Tensor:
        encoded.append(len(tokens))
        return right(self, tokens, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(CaptionEncoder, "encode_tokens", counted)
    command = ["store", "repair", str(tmp_path / "store"), f"data.train={data}", "device=cpu"]
    # another encoder could not make what was lost: nothing is dropped
    assert main([*command, f"llm.path={llm}", "llm.dim=7"]) == 2
    assert "dim: stored 8, expected 7" in capsys.readouterr().err and shard.exists()
    assert main([*command, f"llm.path={llm}", "llm.dim=8"]) == 0
    assert sum(encoded) == 1024
    assert "dropped 1024 captions and embedded them again; the store has 3000" in capsys.readouterr().out
    again = EmbeddingStore.open(tmp_path / "store")
    assert again.complete and verify_store(tmp_path / "store").ok
    torch.testing.assert_close(again.get(names), expected, atol=1e-5, rtol=1e-5)
    # what is not in the data given is gone, and that is said
    flip(tmp_path / "store" / StoreIndex.load(tmp_path / "store").shards[0].file, "digests", 0)
    data.write_text(json.dumps(records[-1]) + "\n")
    assert main([*command, f"llm.path={llm}", "llm.dim=8"]) == 0
    assert "of them are not in the data given" in capsys.readouterr().out
