"""Names of the files and folders in a run folder."""

from __future__ import annotations

JOURNAL, PLAN, LOCK, BATCH_SIZES = "run.json", "plan.json", ".lock", "batch-sizes.json"  # the last for a resumed run
GENERATED_WINDOWS, RECOVERY_WINDOWS = "self-generated.safetensors", "recover-generated.safetensors"  # dense model's
RECOVERY, REPAIRED = "recovery.json", "repaired"  # figures of the training, and the checkpoint from before it
RECOVERY_LENGTH = "recover-windows.txt"  # the number to train on, where the recipe gives hours
VOCABULARY, FULL_VOCABULARY = "vocabulary.json", "full-vocabulary"  # figures of its cut; the checkpoint from before
DENSE_KEPT_TOKENS = "dense-kept-tokens"  # in the tasks' folder: answers of a dense model with more tokens
VOCABULARY_STATE = "vocabulary.partial"  # unfinished checkpoint with fewer tokens
ROUNDS, PREDICTIONS = "rounds", "predictions.partial"  # earlier rounds; in it, the dense model's predictions
RECOVERY_WINDOWS_PARTS, RECOVERY_STATE = "recover-generated.partial", "recover.partial"  # unfinished ones
SCORES, LAYER_SCORES = "scores.safetensors", "layer-scores.safetensors"  # of pass 1, and of ablation
LAYER_ORDER, SPEEDS = "layer-order.json", "speed-table.json"  # of a run with a budget
SEARCH, FRONTIER = "search.json", "frontier.html"  # figures of its search, and their page
SEARCH_TRIALS, SEARCH_SO_FAR = "search.partial", "search-so-far.json"  # trials of an unfinished search, and figures
MEMBERS, FAMILY = "members", "family.html"  # runs of a family, and the page that compares them
HIDDEN_STATES, TASKS = "dense.partial", "tasks"  # cache that pass 1 writes for pass 2; results of each finished task
GGUF, GGUF_FILES = "gguf.json", "gguf"  # figures of the exported files, and their folder
QUANTIZED, QUANTIZED_MODEL = "quantized.json", "quantized"  # figures of the result in its base's format, and its folder
PRODUCTS = (
    "recipe.yaml", PLAN, BATCH_SIZES, GENERATED_WINDOWS, RECOVERY_WINDOWS, RECOVERY_WINDOWS_PARTS,
    SCORES, LAYER_SCORES, LAYER_ORDER, SPEEDS, SEARCH, FRONTIER, FAMILY, SEARCH_TRIALS, SEARCH_SO_FAR, "cut.json",
    "cut.safetensors", "source-check.json", "calibration-check.json", "pruning.json", RECOVERY, "evaluation.json",
    "report.json", "report.html", "published.json", "card", "model", "model.partial", REPAIRED, RECOVERY_LENGTH,
    RECOVERY_STATE, VOCABULARY, FULL_VOCABULARY, VOCABULARY_STATE, HIDDEN_STATES, TASKS, GGUF, GGUF_FILES,
    QUANTIZED, QUANTIZED_MODEL, f"{QUANTIZED_MODEL}.partial",
)  # fmt: skip
