"""Commands: `llm2clip demo | data | finetune-llm | embed | store | train | evaluate | export | search | plan`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

from llm2clip.errors import UserError
from llm2clip.training.signals import unwound

Handler = Callable[[argparse.Namespace], int]
TRAINER_PACKAGES = ("yaml", "transformers", "peft", "PIL", "pyarrow", "tqdm", "safetensors", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 for an error the user can act on."""
    parser, names = build_parser()
    given = list(sys.argv[1:] if argv is None else argv)
    if " ".join(given[:2]) in names:  # `evaluate zero-shot` is a command of its own beside `evaluate`
        given[:2] = [" ".join(given[:2])]
    args, rest = parser.parse_known_args(given)
    # argparse takes settings in one row only; those after an option are left over
    if rest and (not hasattr(args, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        with unwound():
            _quiet_libraries(args)
            return args.handler(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in TRAINER_PACKAGES:
            raise
        print(f"error: {error.name} is not installed; pip install 'llm2clip[train]'", file=sys.stderr)
        return 2
    except (
        BrokenPipeError
    ):  # the reader of our output went away (`| head`): nothing to report, nobody to tell
        sys.stdout = None  # type: ignore[assignment]
        return 0
    except SystemExit as stop:  # a signal: the step was finished, or what was half-written removed
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130


def build_parser() -> tuple[argparse.ArgumentParser, Collection[str]]:
    """The parser with every command, and the names of the commands."""
    parser = argparse.ArgumentParser(
        prog="llm2clip", description="LLM2CLIP: a fine-tuned decoder LLM teaches CLIP's visual encoder."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_configured(
        commands, "finetune-llm", "LLM stage: LoRA on caption pairs, or MNTP before it", _finetune_llm
    )
    _add_configured(commands, "embed", "embed every caption once into a store", _embed)
    _add_configured(
        commands, "embed images", "image features of a CLIP model or tower, into a store", _embed_images
    )
    _add_configured(commands, "embed texts", "caption features of a CLIP model, into a store", _embed_texts)
    _add_configured(commands, "train", "CLIP stage: vision tower and adapter on stored embeddings", _train)
    _add_configured(commands, "evaluate", "retrieval tables and report.html", _evaluate)
    _add_configured(
        commands, "evaluate caption-retrieval", "captions that look for captions (CRA)", _caption_retrieval
    )
    _add_configured(commands, "evaluate retrieval", "benchmarks of image-text retrieval", _retrieval)
    _add_configured(commands, "evaluate zero-shot", "classification by class names in prompts", _zero_shot)
    _add_configured(
        commands, "evaluate linear-probe", "linear classifier, neighbours on features", _linear_probe
    )
    _add_configured(commands, "export", "models for Hugging Face, open_clip, ONNX; merged LLMs", _export)
    search = _add_configured(
        commands, "search", "a local web page: images by captions, captions by images", _search
    )
    search.add_argument("--model", help="run of the CLIP stage, or a demo's directory; as model=RUN")
    search.add_argument(
        "--images", action="append", help="folder of images, or a source; may be repeated; as images=[...]"
    )

    _add_configured(commands, "plan", "memory, disk and hours of both stages, before anything starts", _plan)

    demo = commands.add_parser("demo", help="both stages on a small real dataset, evaluated, with a report")
    demo.add_argument(
        "--data", default="cataclysm", help="`cataclysm` or a directory with train-*/val-* shards"
    )
    demo.add_argument("--out", default="runs/demo", help="directory of everything the demo writes")
    demo.add_argument("--config", help="YAML file that replaces the demo's settings for this data")
    demo.set_defaults(handler=_demo)

    from llm2clip.data.cli import add_data_parser

    add_data_parser(commands)

    from llm2clip.store_cli import add_store_parser

    add_store_parser(commands)

    env = commands.add_parser("env", help="versions, what was built, which backend each op uses")
    env.add_argument("--json", action="store_true", help="print JSON")
    env.set_defaults(handler=_env)
    return parser, commands.choices.keys()


def _add_configured(commands: Any, name: str, text: str, handler: Handler) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text}. Settings: docs/config.md.")
    parser.add_argument("--config", help="YAML file with settings")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="settings, e.g. optim.lr=1e-3")
    parser.set_defaults(handler=handler)
    return parser


def _quiet_libraries(args: argparse.Namespace) -> None:
    """Leave the terminal to our own progress: no bars and no deprecation notes of transformers.

    Only for commands that load it anyway; as a library the package changes nobody's logging.
    """
    # every command with settings does, unless it only prints them
    if getattr(args, "print_config", None) is False or args.handler is _demo:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _settings(args: argparse.Namespace, cls: type) -> Any:
    """The resolved settings, or None when they were only to be printed."""
    from llm2clip.config import dump_yaml, load_settings

    settings: Any = load_settings(cls, args.config, args.overrides)
    if args.print_config:
        print(dump_yaml(settings), end="")
        return None
    return settings


def _finetune_llm(args: argparse.Namespace) -> int:
    from llm2clip.settings import FinetuneLLMSettings

    if (settings := _settings(args, FinetuneLLMSettings)) is not None:
        from llm2clip.training.run import finetune_llm

        finetune_llm(settings)
    return 0


def _embed(args: argparse.Namespace) -> int:
    from llm2clip.settings import EmbedSettings

    if (settings := _settings(args, EmbedSettings)) is not None:
        from llm2clip.embed import embed

        store = embed(settings)
        _say(f"{len(store)} embeddings of dimension {store.dim} in {settings.out}")
    return 0


def _embed_images(args: argparse.Namespace) -> int:
    from llm2clip.settings import EmbedImagesSettings

    if (settings := _settings(args, EmbedImagesSettings)) is not None:
        from llm2clip.embed_clip import embed_images

        store = embed_images(settings)
        _say(f"{len(store)} image features of dimension {store.dim} in {settings.out}")
    return 0


def _embed_texts(args: argparse.Namespace) -> int:
    from llm2clip.settings import EmbedTextsSettings

    if (settings := _settings(args, EmbedTextsSettings)) is not None:
        from llm2clip.embed_clip import embed_texts

        store = embed_texts(settings)
        _say(f"{len(store)} caption features of dimension {store.dim} in {settings.out}")
    return 0


def _say(text: str) -> None:
    """Print a result once, however many ranks torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def _train(args: argparse.Namespace) -> int:
    from llm2clip.settings import TrainSettings

    if (settings := _settings(args, TrainSettings)) is not None:
        from llm2clip.training.run import train_clip

        train_clip(settings)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from llm2clip.settings import EvaluateSettings

    if (settings := _settings(args, EvaluateSettings)) is not None:
        from llm2clip.evaluation import evaluate

        evaluate(settings)
    return 0


def _caption_retrieval(args: argparse.Namespace) -> int:
    from llm2clip.settings import CaptionRetrievalSettings

    if (settings := _settings(args, CaptionRetrievalSettings)) is not None:
        from llm2clip.evaluation.caption_benchmark import evaluate_captions

        evaluate_captions(settings)
    return 0


def _retrieval(args: argparse.Namespace) -> int:
    from llm2clip.settings import RetrievalSettings

    if (settings := _settings(args, RetrievalSettings)) is not None:
        from llm2clip.evaluation.benchmark_retrieval import evaluate_retrieval

        evaluate_retrieval(settings)
    return 0


def _zero_shot(args: argparse.Namespace) -> int:
    from llm2clip.settings import ZeroShotSettings

    if (settings := _settings(args, ZeroShotSettings)) is not None:
        from llm2clip.evaluation.benchmark_zero_shot import evaluate_zero_shot

        evaluate_zero_shot(settings)
    return 0


def _linear_probe(args: argparse.Namespace) -> int:
    from llm2clip.settings import LinearProbeSettings

    if (settings := _settings(args, LinearProbeSettings)) is not None:
        from llm2clip.evaluation.benchmark_probe import evaluate_linear_probe

        evaluate_linear_probe(settings)
    return 0


def _export(args: argparse.Namespace) -> int:
    from llm2clip.settings import ExportSettings

    if (settings := _settings(args, ExportSettings)) is not None:
        from llm2clip.export import export

        print(f"{settings.layout} layout in {export(settings)}, loaded back with equal features")
    return 0


def _search(args: argparse.Namespace) -> int:
    from llm2clip.settings import SearchSettings

    for name in ("model", "images"):
        if (given := getattr(args, name)) is not None:
            args.overrides.append(f"{name}={json.dumps(given)}")  # JSON is YAML
    if (settings := _settings(args, SearchSettings)) is not None:
        from llm2clip.search.run import run_search

        run_search(settings)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from llm2clip.settings import PlanSettings

    if (settings := _settings(args, PlanSettings)) is not None:
        from llm2clip.plan.run import run_plan

        return run_plan(settings)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from llm2clip.demo import run_demo

    return run_demo(data=args.data, out=args.out, config=args.config)


def _env(args: argparse.Namespace) -> int:
    from llm2clip.environment import environment, render
    from llm2clip_kernels import build_info

    info = {**environment(), "kernels": build_info()}
    print(json.dumps(info, indent=2, default=str) if args.json else render(info))
    return 0
