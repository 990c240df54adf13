"""`python -m llm2clip`, for torchrun."""

import sys

from llm2clip.cli import main

if __name__ == "__main__":
    sys.exit(main())
