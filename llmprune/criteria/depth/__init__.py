"""Depth criteria, one a file; a file that is added here is found without being named anywhere."""

from llmprune.common.variants import import_kinds

# A recipe may leave out ``kind``: the first kind that has all the given keys is meant, so these keep their places.
import_kinds(__name__, first=("divergence", "block_influence", "angular", "perplexity", "residual"))
