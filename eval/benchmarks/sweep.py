"""Every causal model type that transformers can build: what can be cut, what is refused and why.

    python eval/benchmarks/sweep.py                 # all types; records the table under eval/benchmarks/results
    python eval/benchmarks/sweep.py llama gpt2      # these only; their rows of the record are replaced

For each type: a tiny random model → each of several depth cuts compared with the dense model that skips the same
layers → a whole ``llmprune run`` of all that is not refused, verified by plain transformers in another process.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from layer_skipping import compare_with_skipping
from safetensors.torch import save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from llmprune import CheckpointError, LLMPruneError, ModelError, Recipe, RecipeError, VerificationError, run
from llmprune.anatomy.discovery import discover
from llmprune.anatomy.known_refusals import refused_model
from llmprune.checkpoint.result import verify
from llmprune.testing import VOCABULARY, tiny_config, tiny_model

RESULTS = Path(__file__).parent / "results"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # tiny models only lose by more
AFTER = "refused after the work"
SECTIONS: dict[str, dict[str, Any]] = {
    "depth": {"depth": {"remove": 1}},
    "width": {"width": {"mlp": 0.67}},
    "heads": {"width": {"heads": 0.5}},
    "experts": {"experts": {"remove": 1}},
}

# Plain transformers in a process of its own that outlives one model: runs the verification's own worker.
SERVER = """
import importlib.util, io, json, sys
from contextlib import redirect_stdout
spec = importlib.util.spec_from_file_location("worker", sys.argv[1])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
for line in sys.stdin:
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            worker.main(*json.loads(line))
        answer = [0, out.getvalue(), ""]
    except Exception as error:
        answer = [1, "", f"{type(error).__name__}: {error}".replace("\\n", " ")]
    print(json.dumps(answer), flush=True)
"""


class FreshProcess:
    """Stands in for the ``subprocess`` that the verification starts: the same worker, imports paid once."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, command: list[str], **_: Any) -> SimpleNamespace:
        """Answer as ``subprocess.run`` does; a server that died is the answer, and is replaced."""
        server = self._server
        if server is None or server.poll() is not None:
            arguments = [sys.executable, "-P", "-c", SERVER, command[2]]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            server = self._server = subprocess.Popen(arguments, text=True, env=ONE_THREAD, **pipes)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(command[3:]) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        code, out, err = json.loads(answer) if answer else (server.wait(), "", "the process died")
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)


def all_types() -> list[str]:
    """Model types that have a causal language model, and those whose text decoder sees images too."""
    mappings = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return sorted({config_class.model_type for mapping in mappings for config_class in mapping})


def sweep_type(family: str, folder: Path) -> dict[str, Any]:
    """The verdicts of one model type, in words."""
    try:
        config = tiny_config(family)
        if refused_model(config):
            return dict.fromkeys(SECTIONS, f"refused: {refused_model(config)}")
        model = tiny_model(family)
        tokens = {"ids": torch.randint(3, VOCABULARY - 8, (4, 24), generator=torch.Generator().manual_seed(0))}
        with torch.no_grad():
            model(input_ids=tokens["ids"], use_cache=False)
    except Exception as error:
        return dict.fromkeys(SECTIONS, f"not built: {_line(error)}")
    model.save_pretrained(folder / "dense")
    save_file(tokens, folder / "tokens.safetensors")
    try:
        anatomy = discover(config)
    except ModelError as error:
        return dict.fromkeys(SECTIONS, f"refused: {_line(error)}")
    refusals = {"depth": anatomy.depth_refusal, "width": anatomy.width_refusal}
    refusals["heads"] = anatomy.heads.refusal if anatomy.heads else None
    refusals["experts"] = anatomy.experts.refusal if anatomy.experts else None
    verdicts = {what: f"refused: {why}" for what, why in refusals.items() if why}
    for what, found in (("heads", anatomy.heads), ("experts", anatomy.experts)):
        if found is None:
            verdicts[what] = "none to cut"
    asked = [what for what in SECTIONS if what not in verdicts]
    verdicts |= prune(asked, folder) if asked else {}
    if verdicts["depth"] == "works":
        try:
            wrong = compare_with_skipping(model, tokens["ids"])
        except Exception as error:
            wrong = f"cannot be compared with skipping layers ({type(error).__name__}: {_line(error)})"
        verdicts["depth"] = f"failed: {wrong}" if wrong else "works"
    if any(verdict.startswith(AFTER) for verdict in verdicts.values()):
        untouched = prune([], folder)["nothing"]
        why = "works without a cut" if untouched == "works" else "so does the dense model"
        verdicts = {what: f"{text} ({why})" if text.startswith(AFTER) else text for what, text in verdicts.items()}
    return {what: verdicts[what] for what in SECTIONS}


def prune(cuts: list[str], folder: Path) -> dict[str, str]:
    """Run the whole command for these cuts together; where that fails, for each alone. No cut: a copy."""
    recipe: dict[str, dict[str, Any]] = {
        "model": {"id": str(folder / "dense")},
        "calibration": {
            "tokens": str(folder / "tokens.safetensors"),
            "key": "ids",
            "samples": 4,
            "sequence_length": 24,
        },
    }
    for section, settings in (item for cut in cuts for item in SECTIONS[cut].items()):
        recipe[section] = recipe.get(section, {}) | settings
    name = "-".join(cuts) or "nothing"
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe))
    try:
        report = run(Recipe.load(path), folder / name)
        difference = report.verification.largest_logit_difference
        verdict = "works" if difference == 0 else f"failed: reloaded logits differ by {difference:.2g}"
    except (ModelError, RecipeError) as error:
        verdict = f"refused: {_line(error)}"
    except CheckpointError as error:
        verdict = f"not built: plain transformers does not reload the dense model: {_line(error)}"
    except VerificationError as error:
        verdict = f"{AFTER}: {_line(error)}"
    except LLMPruneError as error:
        verdict = f"failed: {_line(error)}"
    except Exception as error:
        verdict = f"failed: {type(error).__name__}: {_line(error)}"
    if verdict != "works" and len(cuts) > 1:
        return {what: text for cut in cuts for what, text in prune([cut], folder).items()}
    return dict.fromkeys(cuts or [name], verdict)


def _line(error: Exception) -> str:
    text = re.sub(r"/\S+/(?=dense|checkpoint)", "", " ".join(str(error).split())) or type(error).__name__
    return text if len(text) < 400 else text[:400] + " …"


def child(families: list[str]) -> None:
    """Sweep these types in this process; prints a JSON line for each."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    verify.__dict__["subprocess"] = FreshProcess()
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            verdict = sweep_type(family, Path(folder))
        print(json.dumps({"type": family, **verdict}), flush=True)


def sweep(families: list[str]) -> Iterator[dict[str, Any]]:
    """The verdict of every type; a type that kills its process has failed, and the rest go on."""
    left = list(families)
    while left:
        command = [sys.executable, __file__, "--child", *left]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ONE_THREAD) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"type"'):
                    row = json.loads(line)
                    left.remove(row["type"])
                    yield row
        if left:
            yield {"type": left.pop(0)} | dict.fromkeys(SECTIONS, f"failed: the process died ({process.returncode})")


def table(rows: list[dict[str, Any]]) -> str:
    """The verdicts as a Markdown page."""
    counts = {what: Counter(row[what].split(":")[0] for row in rows).most_common() for what in SECTIONS}
    lines = [
        "# Every causal model type",
        "",
        f"transformers {transformers.__version__}; written by `eval/benchmarks/sweep.py`.",
        "",
        *(f"- {what}: " + ", ".join(f"{n} {word}" for word, n in count) for what, count in counts.items()),
        "",
        "| model type | " + " | ".join(SECTIONS) + " |",
        "|---" * (len(SECTIONS) + 1) + "|",
    ]
    for row in rows:
        cells = [row[what].replace("|", "\\|") for what in SECTIONS]
        cells = cells if len(set(cells)) > 1 or cells[0] == "works" else [cells[0], *["the same"] * (len(cells) - 1)]
        lines.append(f"| {row['type']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, sweep, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; default: all")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.types)
        return
    for row in sweep(arguments.types or all_types()):
        print(" · ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        record(row)


def record(row: dict[str, Any]) -> None:
    """Put a verdict into the recorded table, in the place of an earlier one of its type."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "sweep.json"
    known = json.loads(path.read_text())["types"] if path.is_file() else []
    rows = sorted([*(other for other in known if other["type"] != row["type"]), row], key=lambda row: row["type"])
    found = {"transformers": transformers.__version__, "torch": torch.__version__, "types": rows}
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
