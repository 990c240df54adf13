"""Runs open_clip's own training entry point without the patch, then with it; a program of its own.

python -m tests.hosts.open_clip_run MODELS LOGS [arguments of open_clip_train.main ...]
"""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext


def main() -> None:
    models, logs, *arguments = sys.argv[1:]
    import open_clip
    from open_clip_train.main import main as train

    from llm2clip.integrations.open_clip import patch

    open_clip.add_model_config(models)
    for name, context in (("original", nullcontext()), ("fused", patch())):
        with context:
            train([*arguments, "--logs", logs, "--name", name])
        # each run writes its own file alone
        for handler in list(logging.root.handlers):
            logging.root.removeHandler(handler)


if __name__ == "__main__":
    main()
