"""Runs on several sources of text: scores combined, and the report of their agreement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import verify_here

from llmprune import Recipe, run
from llmprune.common.errors import RecipeError
from llmprune.testing import tiny_model
