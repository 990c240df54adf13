"""The embedding stage: every caption once through the fine-tuned LLM, into a store.

The job goes on where it stopped, whatever stopped it: captions that the store holds are not computed
again. Under `torchrun` each rank embeds its share into a store of its own inside the directory, and rank
0 takes them over at the end (or at the next start, if the job was killed before). No list of all captions is
kept: memory is some 40 bytes for each caption of a rank's share.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from llm2clip.config import dump_yaml
from llm2clip.data.caption_stream import CaptionStream, Wanted, take_census
from llm2clip.data.store import EmbeddingStore, StoreWriter, repair_store
from llm2clip.data.store_format import INDEX_NAME
from llm2clip.errors import ConfigError, DataError
from llm2clip.files import write_json, write_text
from llm2clip.progress import Progress
from llm2clip.settings import EmbedSettings
from llm2clip.training.signals import exit_status, stop_requested
from llm2clip.training.world import World, start_world

SUMMARY_NAME, SETTINGS_NAME = "embed.json", "config.yaml"
_RANK_STORES = "rank-*"


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


def embed(settings: EmbedSettings, encoder: Encoder | None = None) -> EmbeddingStore:
    """Embed every caption of `settings.data` into the store `settings.out`.

    Args:
        settings: the job.
        encoder: caption encoder to use; None loads `settings.llm`.

    Damaged shards are dropped and their captions embedded again: those missing, cut or without header always,
    those with a wrong checksum with `settings.verify` (reads the whole store).

    Raises:
        ConfigError: no output directory or no source is given.
        DataError: too many samples cannot be read, there is no caption, or the data changed meanwhile.
        StoreError: the store was begun with another encoder or other settings.
        UserError: no space left on disk; what was embedded before is kept.
        SystemExit: 143 after SIGTERM, 130 after SIGINT, 0 after SIGUSR1; what was computed is in the store.
    """
    if not settings.out:
        raise ConfigError(
            "out is empty; give the directory of the embedding store, for example out=runs/store"
        )
    with start_world(settings.device, settings.threads) as world:
        if encoder is None:
            from llm2clip.models.caption_encoder import CaptionEncoder

            encoder = CaptionEncoder.from_settings(settings.llm, world.device)
        stream = CaptionStream(settings.data)
        census = take_census(
            stream, settings.data.captions, rank=world.rank, size=world.size, progress=world.is_main
        )
        root = Path(settings.out)
        if world.is_main:
            _drop_damaged(root, settings.verify)
            with _writer(root, settings, encoder) as writer:
                said, file = dump_yaml(settings), root / SETTINGS_NAME
                if not file.is_file() or file.read_text(encoding="utf-8") != said:
                    write_text(file, said)
                take_over_rank_stores(writer)
                writer.flush()
                writer.write_lookup()
        world.barrier()
        known = EmbeddingStore.open(root)
        wanted = Wanted(census.own[known.find_digests(census.own) < 0])
        unique, missing = _total(len(census.own), world), _total(len(wanted), world)
        del known
        already_cut = encoder.truncated
        start = time.monotonic()
        own = root if world.is_main else root / f"rank-{world.rank:03d}"
        with _writer(own, settings, encoder) as writer:
            with stop_requested() as stopping:
                _encode(
                    writer, wanted, stream, encoder, settings, world, done=unique - missing, stopping=stopping
                )
                writer.flush()
                end_if_asked(world, stopping())
            if wanted.left:
                raise DataError(
                    f"{wanted.left} captions that were there when the job began were not found again: the data "
                    "changed, or could not be read for a while. What was embedded is kept; run the same command again."
                )
            world.barrier()
            if world.is_main:
                take_over_rank_stores(writer)
                writer.finish()
        seconds = time.monotonic() - start
        if world.is_main:
            summary = EmbedSummary(
                captions=census.captions,
                unique=unique,
                embedded=missing,
                truncated=encoder.truncated - already_cut,
                bad_samples=census.bad,
                seconds=round(seconds, 3),
                captions_per_second=round(missing / max(seconds, 1e-9), 3),
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


def _total(count: int, world: World) -> int:
    """The sum of `count` over the ranks."""
    if world.size == 1:
        return count
    total = torch.tensor(count, device=world.device)
    dist.all_reduce(total)
    return int(total.item())


def _encode(
    writer: StoreWriter,
    wanted: Wanted,
    stream: CaptionStream,
    encoder: Encoder,
    settings: EmbedSettings,
    world: World,
    *,
    done: int,
    stopping: Callable[[], int],
) -> None:
    # a window is one commit
    windows = wanted.windows(stream.read(), settings.commit_rows) if len(wanted) else iter(())
    budget = settings.token_budget or None
    initial = done if world.size == 1 else 0

    def prepare() -> tuple[list[str], Sequence[Any]] | None:
        window = next(windows, None)
        return None if window is None else (window, encoder.tokenize(window))

    def write(window: list[str], embeddings: Tensor) -> None:
        writer.add(window, embeddings)
        writer.flush()

    # the next window is read and tokenised and the last one written while this one is computed; leaving the block
    # waits for the write, so what was computed before an error or Ctrl-C is kept
    with (
        Progress(
            initial + len(wanted), "embedding", "captions", initial=initial, enabled=world.is_main
        ) as shown,
        ThreadPoolExecutor(1, "write") as disk,
        ThreadPoolExecutor(1, "tokenize") as ahead,
    ):
        written: Future[None] | None = None
        coming = ahead.submit(prepare)
        while not stopping() and (prepared := coming.result()) is not None:
            window, tokens = prepared
            coming = ahead.submit(prepare)
            embeddings = encoder.encode_tokens(tokens, token_budget=budget, progress=shown)
            if written is not None:
                written.result()
            written = disk.submit(write, window, embeddings)
        if written is not None:
            written.result()


def end_if_asked(world: World, signal: int) -> None:
    """End all ranks when one of them was asked to; each has committed what it computed.

    Args:
        world: this rank; those that were not asked get here when their share is embedded.
        signal: number of the signal that this rank got, else 0.

    Raises:
        SystemExit: with the status that belongs to the signal.
    """
    if number := world.max(signal):
        raise SystemExit(exit_status(number))


def _drop_damaged(root: Path, verify: bool) -> None:
    if not (root / INDEX_NAME).exists():
        return
    for file, damage in repair_store(root, checksums=verify).damaged.items():
        what = f"dropped {damage.count} damaged captions of {file}" if damage.rows else f"replaced {file}"
        print(f"{what} ({damage.reason}); what is lost is made again", file=sys.stderr)


def take_over_rank_stores(writer: StoreWriter) -> None:
    """Move what other ranks embedded into the store of rank 0."""
    for store in sorted(writer.path.glob(_RANK_STORES)):
        if (store / INDEX_NAME).exists():
            _drop_damaged(store, verify=False)
            writer.absorb(store)
        shutil.rmtree(store)
