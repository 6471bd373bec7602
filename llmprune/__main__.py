"""Entry point of ``python -m llmprune``."""

from llmprune.cli.main import main

main()
