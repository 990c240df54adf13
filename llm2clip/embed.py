"""The embedding stage: every caption once through the fine-tuned LLM, into a store.

The job goes on where it stopped, whatever stopped it: captions that the store holds are not computed
again. Under `torchrun` each rank embeds its share into a store of its own inside the directory, and rank
0 takes them over at the end (or at the next start, if the job was killed before).
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from llm2clip.data.sample import Sample
from llm2clip.data.sources import open_source
from llm2clip.data.store import EmbeddingStore, StoreWriter, repair_store
from llm2clip.data.store_format import INDEX_NAME
from llm2clip.errors import BadSampleError, ConfigError, DataError
from llm2clip.files import write_json
from llm2clip.progress import Progress
from llm2clip.settings import CaptionSettings, DataSettings, EmbedSettings
from llm2clip.training.world import World, start_world

SUMMARY_NAME = "embed.json"
_RANK_STORES = "rank-*"
_BAD_SHARE_FROM = 50  # samples to see before the share of bad ones means anything


class Encoder(Protocol):
    """What embedding needs of a caption encoder."""

    @property
    def dim(self) -> int: ...

    @property
    def truncated(self) -> int: ...

    def tokenize(self, texts: Sequence[str]) -> Sequence[Any]: ...

    def encode_tokens(
        self, tokens: Sequence[Any], *, token_budget: int | None = ..., progress: Progress | None = ...
    ) -> Tensor: ...

    def fingerprint(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class EmbedSummary:
    """What one run of the job did; written to `embed.json` in the store.

    Attributes:
        captions: captions in the data, repeated ones included.
        unique: different captions among them.
        embedded: captions that this run computed (all ranks).
        truncated: captions that rank 0 cut to the LLM's `max_length`.
        bad_samples: samples that could not be read.
        seconds: time spent embedding.
        captions_per_second: `embedded / seconds`.
    """

    captions: int
    unique: int
    embedded: int
    truncated: int
    bad_samples: int
    seconds: float
    captions_per_second: float

    def __str__(self) -> str:
        text = f"{self.captions} captions, {self.unique} different; {self.embedded} embedded now"
        if self.embedded:
            text += f" in {self.seconds:.0f} s ({self.captions_per_second:.1f}/s), {self.truncated} truncated"
        return text + (f"; {self.bad_samples} samples could not be read" if self.bad_samples else "")


@dataclass
class CaptionCollection:
    """Different captions of the data, in order of first appearance."""

    texts: dict[str, None]
    captions: int = 0
    bad: int = 0


def collect_captions(data: DataSettings, *, progress: bool = True) -> CaptionCollection:
    """Every caption that training or evaluation may ask for.

    Captions of every role of `data.train` and `data.val`; translations of `data.val` alone, since only the
    cross-lingual tables read them. All texts of a field count, not just the first.

    Raises:
        ConfigError: neither training nor held-out sources are given.
        DataError: more than `data.max_bad_share` of the samples cannot be read, or no caption was found.
    """
    if not data.train and not data.val:
        raise ConfigError("data.train and data.val are both empty; name the sources whose captions to embed")
    found = CaptionCollection({})
    for paths, fields in (
        (data.train, caption_fields(data.captions)),
        (data.val, caption_fields(data.captions, translations=True)),
    ):
        if not paths:
            continue
        for sample in _samples(data, paths, found, progress):
            for field in fields:
                for text in sample.captions.get(field, ()):
                    found.captions += 1
                    found.texts.setdefault(text)
    if not found.texts:
        wanted = ", ".join(caption_fields(data.captions, translations=True)) or "none"
        raise DataError(
            f"the data holds no caption under the fields asked for ({wanted}); set data.captions.short and "
            "data.captions.long to fields of your data (`llm2clip data check` lists them)"
        )
    return found


def caption_fields(captions: CaptionSettings, *, translations: bool = False) -> tuple[str, ...]:
    """Fields that play a role, each once."""
    fields = [field for role in captions.all_roles.values() for field in role]
    extra = tuple(captions.translations.values()) if translations else ()
    return tuple(dict.fromkeys((*fields, *extra)))


def _samples(
    data: DataSettings, paths: tuple[str, ...], found: CaptionCollection, progress: bool
) -> Iterator[Sample]:
    source = open_source(paths, limit=data.limit)
    bad: list[str] = []
    with Progress(len(source), "reading captions", "samples", enabled=progress) as shown:
        for index in shown.track(range(len(source))):
            try:
                sample = source.captions_of(index)
            except BadSampleError as problem:
                found.bad += 1
                bad.append(str(problem))
                if len(bad) <= 10:
                    print(f"skipped {problem}", file=sys.stderr)
                if index + 1 >= _BAD_SHARE_FROM and len(bad) > data.max_bad_share * (index + 1):
                    raise DataError(
                        f"{len(bad)} of the first {index + 1} samples cannot be read, more than "
                        f"data.max_bad_share = {data.max_bad_share}. The first:\n  " + "\n  ".join(bad[:10])
                    ) from None
                continue
            yield sample


def embed(settings: EmbedSettings, encoder: Encoder | None = None) -> EmbeddingStore:
    """Embed every caption of `settings.data` into the store `settings.out`.

    Args:
        settings: the job.
        encoder: caption encoder to use; None loads `settings.llm`.

    Damaged shards are dropped and their captions embedded again: those missing, cut or without header always,
    those with a wrong checksum with `settings.verify` (reads the whole store).

    Raises:
        ConfigError: no output directory or no source is given.
        StoreError: the store was begun with another encoder or other settings.
        UserError: no space left on disk; what was embedded before is kept.
    """
    if not settings.out:
        raise ConfigError(
            "out is empty; give the directory of the embedding store, for example out=runs/store"
        )
    with start_world(settings.device, settings.threads) as world:
        if encoder is None:
            from llm2clip.models.caption_encoder import CaptionEncoder

            encoder = CaptionEncoder.from_settings(settings.llm, world.device)
        found = collect_captions(settings.data, progress=world.is_main)
        root = Path(settings.out)
        if world.is_main:
            _drop_damaged(root, settings.verify)
            with _writer(root, settings, encoder) as writer:
                take_over_rank_stores(writer)
                writer.flush()
        world.barrier()
        known = EmbeddingStore.open(root)
        texts = list(found.texts)
        missing = [text for text, row in zip(texts, known.find(texts).tolist(), strict=True) if row < 0]
        already_cut = encoder.truncated
        start = time.monotonic()
        own = root if world.is_main else root / f"rank-{world.rank:03d}"
        with _writer(own, settings, encoder) as writer:
            # every W-th caption: ranks get the same mix of lengths and end together
            share = missing[world.rank :: world.size]
            _encode_missing(
                writer, writer.missing(share), encoder, settings, world, len(texts) - len(missing)
            )
            writer.flush()
            world.barrier()
            if world.is_main:
                take_over_rank_stores(writer)
                writer.finish()
        seconds = time.monotonic() - start
        if world.is_main:
            summary = EmbedSummary(
                captions=found.captions,
                unique=len(texts),
                embedded=len(missing),
                truncated=encoder.truncated - already_cut,
                bad_samples=found.bad,
                seconds=round(seconds, 3),
                captions_per_second=round(len(missing) / max(seconds, 1e-9), 3),
            )
            if missing or not (root / SUMMARY_NAME).exists():
                write_json(root / SUMMARY_NAME, asdict(summary))
            print(f"{root}: {summary}", file=sys.stderr)
        world.barrier()
    return EmbeddingStore.open(root)


def _writer(path: Path, settings: EmbedSettings, encoder: Encoder) -> StoreWriter:
    return StoreWriter(
        path,
        dim=encoder.dim,
        dtype=settings.dtype,
        fingerprint=encoder.fingerprint(),
        shard_rows=settings.shard_rows,
        commit_rows=settings.commit_rows,
    )


def _encode_missing(
    writer: StoreWriter, texts: list[str], encoder: Encoder, settings: EmbedSettings, world: World, done: int
) -> None:
    total = len(texts) if world.size > 1 else done + len(texts)
    initial = 0 if world.size > 1 else done
    # a window is one commit; every window has captions of all lengths (the encoder sorts inside it), so
    # commits come at regular intervals and the time left is honest
    count = max(1, -(-len(texts) // settings.commit_rows))
    windows = [window for window in (texts[number::count] for number in range(count)) if window]
    budget = settings.token_budget or None

    def write(window: list[str], embeddings: Tensor) -> None:
        writer.add(window, embeddings)
        writer.flush()

    # the next window is tokenised and the last one written while this one is computed; leaving the block
    # waits for the write, so what was computed before an error or Ctrl-C is kept
    with (
        Progress(total, "embedding", "captions", initial=initial, enabled=world.is_main) as shown,
        ThreadPoolExecutor(1, "write") as disk,
        ThreadPoolExecutor(1, "tokenize") as ahead,
    ):
        coming = ahead.submit(encoder.tokenize, windows[0]) if windows else None
        written: Future[None] | None = None
        for number, window in enumerate(windows):
            assert coming is not None
            tokens = coming.result()
            coming = (
                ahead.submit(encoder.tokenize, windows[number + 1]) if window is not windows[-1] else None
            )
            embeddings = encoder.encode_tokens(tokens, token_budget=budget, progress=shown)
            if written is not None:
                written.result()
            written = disk.submit(write, window, embeddings)
        if written is not None:
            written.result()


def _drop_damaged(root: Path, verify: bool) -> None:
    if not (root / INDEX_NAME).exists():
        return
    for file, reason in repair_store(root, checksums=verify).damaged.items():
        print(
            f"dropped the damaged shard {file} ({reason}); its captions are embedded again", file=sys.stderr
        )


def take_over_rank_stores(writer: StoreWriter) -> None:
    """Move what other ranks embedded into the store of rank 0."""
    for store in sorted(writer.path.glob(_RANK_STORES)):
        if (store / INDEX_NAME).exists():
            _drop_damaged(store, verify=False)
            writer.absorb(store)
        shutil.rmtree(store)
