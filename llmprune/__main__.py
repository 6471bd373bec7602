"""``python -m llmprune`` is ``llmprune``."""

from llmprune.cli.main import main

main()
