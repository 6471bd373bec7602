"""Recipes are strict: every mistake is reported with its place, its value, the limit and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.recipes import BASE, problems, table, with_section

from llmprune.common.errors import RecipeError
from llmprune.recipe.recipe import Recipe

UNKNOWN_KEYS = table(r"""
dept: {remove: 3}
    dept: unknown key; did you mean 'depth'?
Depth: {remove: 3}
    Depth: unknown key; did you mean 'depth'?
zzz: 1
    zzz: unknown key; valid keys: model, devices, calibration, depth, width, experts, hidden, budget, vocabulary,
7: 1
    7: unknown key; valid keys: model, devices, calibration, depth, width, experts, hidden, budget, vocabulary,
depth: {remove: 3, kep: 2}
    depth.kep: unknown key; did you mean 'keep'?
depth: {remove: 3, int: 2}
    depth.int: unknown key; valid keys: remove, keep, layers, criterion
width: {mpl: 0.5}
    width.mpl: unknown key; did you mean 'mlp'?
refit: {rigde: 1}
    refit.rigde: unknown key; did you mean 'ridge'?
depth: {remove: 1, criterion: {kin: x}}
    depth.criterion.kin: unknown key; did you mean 'kind'?
evaluation: {gate: {min_retention: 1, max: 2}}
    evaluation.gate.max: unknown key
evaluation: {perplexity: {dataset: x, sample: 2}}
    evaluation.perplexity.sample: unknown key
calibration: {sources: [{dataset: x, wieght: 2}]}
    calibration.sources.0.wieght: unknown key
export: {'a b': 1}
    export.'a b': unknown key; valid keys: prediction_heads, max_shard_size, gguf
criterion: angular
    criterion: unknown key here; it is a key of depth, width, experts
sparsity: {pattern: '2:4', criterion: {kind: wanda}}
    sparsity.criterion: unknown key here; it is a key of depth, width, experts
depth: {remove: 1, criterion: {angular: 1}}
    depth.criterion.angular: unknown key; write kind: angular
""")


@pytest.mark.parametrize(("section", "message"), UNKNOWN_KEYS)
def test_unknown_keys(section: str, message: str) -> None:
    """An unknown key is reported by its path, with the nearest name or the valid ones."""
    found = problems(with_section(section))
    assert any(problem.startswith(message) for problem in found), found


WRONG_VALUES = table(r"""
calibration: {dataset: x, samples: true}
    calibration.samples: must be a whole number, not true
depth: {remove: '6'}
    depth.remove: must be a whole number, not '6'; remove the quotes
depth: {remove: 6.0}
    depth.remove: must be a whole number, not 6.0; write 6
depth: {remove: 1e30}
    depth.remove: must be a whole number, not 1e+30 (Number
depth: {remove: 0}
    depth.remove: must be above 0, not 0 (Number of layers to remove)
depth: {remove: 2024-07-01}
    depth.remove: must be a whole number, not '2024-07-01'
depth: {remove: 1:30}
    depth.remove: must be a whole number, not '1:30'
depth: {layers: 3}
    depth.layers: must be a list, not 3
depth: {layers: '3, 4'}
    depth.layers: must be a list, not '3, 4'; write [3, 4]
depth: {layers: []}
    depth.layers: must be a list of at least 1, not []
depth: {layers: [1, a]}
    depth.layers.1: must be a whole number, not 'a'
depth: {layers: [1, 1]}
    depth: layers names a layer twice
depth: {layers: [-1]}
    depth: layers counts from 0
depth: {}
    depth: needs exactly one of remove, keep, layers; none given
depth: {remove: 1, keep: 2}
    depth: needs exactly one of remove, keep, layers; remove and keep given
depth: {remove: 1, criterion: {kind: x}}
    depth.criterion.kind: must be 'divergence' or 'block_influence' or 'angular' or 'perplexity' or 'residual', not 'x'
depth: {remove: 1, criterion: angular}
    depth.criterion: must be a mapping of keys, not 'angular'; write {kind: angular} (How layers are scored)
depth: 3
    depth: must be a mapping of keys, not 3; its keys: remove, keep, layers, criterion, keep_pattern (
width: {mlp: .nan}
    width.mlp: must be a finite number, not .nan
width: {mlp: .inf}
    width.mlp: must be a finite number, not .inf
width: {mlp: 1.5}
    width.mlp: must be at most 1.0, not 1.5 (Fraction of the MLP neurons kept)
width: {mlp: 75}
    width.mlp: must be at most 1.0, not 75; write 0.75 for 75 %
width: {mlp: 75%}
    width.mlp: must be a number, not '75%'; write 0.75 for 75 %
width: {heads: 2.0}
    width.heads: must be at most 1.0, not 2.0; write 2 (Key
width: {mlp: 0}
    width.mlp: must be above 0.0, not 0
width: {mlp: 0.5, neurons: 9216}
    width: needs exactly one of mlp, neurons
refit: {ridge: -1}
    refit.ridge: must be at least 0.0, not -1
refit: true
    refit: leave refit out for the default, give settings such as {ridge: 0.1}, or write false
model: org/model
    model: must be a mapping of keys, not 'org/model'; its keys: id, revision,
model: {id: ''}
    model.id: must be text of at least 1 character, not ''
recover: {tokens: 5, data: {self_generated: some}}
    recover.data.self_generated: must be a whole number or a mapping of keys or 'auto' or false, not 'some'
recover: {tokens: 5, data: {self_generated: -1}}
    recover.data.self_generated: must be at least 0, not -1
model: {id: x, revision: 0123}
    model.revision: must be text, not 123; put it in quotes
model: {id: x, dtype: fp16}
    model.dtype: must be 'auto', 'float32', 'bfloat16' or 'float16', not 'fp16'
model: {id: x, trust_remote_code: yes}
    model.trust_remote_code: must be true or false, not 'yes'
model: {id: x, device_map: gpu}
    model.device_map: must be 'auto', 'cpu' or 'balanced' or a mapping
model: {id: x, device_map: {model.norm: 1.5}}
    model.device_map.'model.norm': must be a whole number or text
devices: 0
    devices: a number of GPUs is at least 1; [0] is the first GPU
devices: [0, 0]
    devices: a GPU is named twice
devices: [0, -1]
    devices: a list holds the numbers of GPUs
devices: some
    devices: must be 'all' or a whole number or a list, not 'some'
model: {id: x, max_memory: {0: lots}}
    model.max_memory.0: a size is a number with a unit, such as 5GB
evaluation: {tasks: hellaswag}
    evaluation.tasks: must be a list, not 'hellaswag'; write ['hellaswag']
evaluation: {tasks: 'hellaswag,arc_easy'}
    evaluation.tasks: must be a list, not 'hellaswag,arc_easy'; write [hellaswag, arc_easy]
evaluation: {tasks: [a, a]}
    evaluation.tasks: a named twice
evaluation: {gate: {}}
    evaluation.gate: a gate needs a bar: min_retention,
evaluation: {gate: {min_retention: 95}}
    evaluation.gate.min_retention: must be at most 1.0, not 95; write 0.95 for 95 %
export: {max_shard_size: -5}
    export.max_shard_size: a size must be above zero
calibration: {mix: genral}
    calibration.mix: there is no mix 'genral'; did you mean 'general'?; mixes: chat, code, general, mathematics
calibration: {mix: general, dataset: x}
    calibration: needs at most one of dataset, sources, tokens or mix; dataset and mix given
calibration: {split: test}
    calibration: split belongs to dataset, not to mix
calibration: {dataset: x, source_key: z}
    calibration: source_key belongs to a tokens file
calibration: {dataset: x, self_generated: some}
    calibration.self_generated: must be
evaluation: {perplexity: {samples: 4}}
    evaluation.perplexity: needs exactly one of dataset, sources or tokens; none given
calibration: {dataset: x, sequence_length: 4}
    calibration.sequence_length: must be at least 8, not 4
calibration: {dataset: x, seed: 4294967296}
    calibration.seed: must be below 4294967296
calibration: {dataset: x, split: 'train[:80'}
    calibration.split: a split is a name
calibration: {dataset: x, split: 'train[:120%]'}
    calibration.split: a split is a name
calibration: {dataset: x.txt, config: en}
    calibration: config belongs to a hub data set, not to x.txt
calibration: {dataset: x, tokens: y, key: z}
    calibration: needs at most one of dataset, sources, tokens or mix
calibration: {dataset: x, key: z}
    calibration: key belongs to a tokens file
calibration: {tokens: x}
    calibration: a tokens file needs key
calibration: {tokens: x, key: y, split: test}
    calibration: split belongs to dataset, not to tokens
calibration: {dataset: x, text_field: a, messages_field: b}
    calibration: text_field and messages_field exc
calibration: {sources: []}
    calibration.sources: must be a list of at least 1
calibration: {sources: [{dataset: x, weight: 0}]}
    calibration.sources.0.weight: must be above 0.0, not 0
calibration: {sources: [{dataset: x}, {dataset: x}]}
    calibration.sources: x is listed twice
""")


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("angular", "not 'angular'; write {kind: angular} (How layers are scored)"),
        ("angula", "not 'angula'; write {kind: NAME} with one of divergence, block_influence, angular"),
        ("angula", "; did you mean 'angular'? (How"),
        (
            "activation",
            "; activation belongs in width.criterion or width.heads_criterion or budget.axes.mlp.criterion or",
        ),
        ("{kind: angula}", "not 'angula'; did you mean 'angular'?"),
        ("{kind: reap}", "not 'reap'; reap belongs in experts.criterion"),
        ("3", "not 3; write {kind: NAME} with one of divergence, block_influence"),
    ],
)
def test_a_criterion_that_is_written_wrongly(criterion: str, message: str) -> None:
    """The message has the right form, the nearest name, or the section that the criterion belongs to."""
    found = problems(with_section(f"depth: {{remove: 1, criterion: {criterion}}}"))
    assert len(found) == 1
    assert message in found[0], found


@pytest.mark.parametrize(("section", "message"), WRONG_VALUES)
def test_wrong_values(section: str, message: str) -> None:
    """A wrong type or value is reported with the path, the value, the limit and the meaning of the key."""
    found = problems(with_section(section))
    assert len(found) == 1, found
    assert found[0].startswith(message), found[0]


def test_all_problems_at_once() -> None:
    """One read reports every mistake: a repeated key, a bad override, wrong values, missing keys."""
    text = "model: {dtype: fp16}\nwidth: {mlp: 2, mlp: 3}\ncalibration: {samples: 0}\ndept: 1\n"
    found = problems(text, ["nonsense", "depth.remove=-1"])
    starts = ["line 2: 'mlp'", "--set 'nonsense'", "model.id", "model.dtype", "calibration.samples",
              "depth.remove", "width.mlp", "dept"]  # fmt: skip
    assert [next(s for s in starts if problem.startswith(s)) for problem in found] == starts
    with pytest.raises(RecipeError, match=r"^mine\.yaml: 8 problems\n  - line 2"):
        Recipe.parse(text, ["nonsense", "depth.remove=-1"], source="mine.yaml")


NOT_A_RECIPE = [
    ("", "a recipe is a mapping of sections, at least model"),
    ("[1, 2]", "a recipe is a mapping"),
    ("model:\n\tid: x", "line 2, column 1: not valid YAML: found character '\\t' that cannot start any"),
    ("model: [", "line 1, column 9: not valid YAML"),
    ("model: *nothing", "line 1, column 8: not valid YAML: found undefined alias 'nothing'"),
    ("model: !!python/object/apply:os.system [ls]", "line 1, column 8: not valid YAML"),
    (BASE + "---\n" + BASE, "line 3, column 1: not valid YAML: but found another document"),
    (BASE + "? [a, b]\n: 1", "line 3: a key must be a word, not a list or a mapping"),
    (BASE + "? {a: b}\n: 1", "line 3: a key must be a word, not a list or a mapping"),
    (BASE + "true: 1", "line 3: a key must be a word, not 'true'; put it in quotes"),
    (BASE + "~: 1", "line 3: a key must be a word, not '~'"),
    (BASE + "depth: {remove: " + "9" * 5000 + "}", "line 3, column 17: not valid YAML: a whole number of 5,000"),
    (BASE + "depth: " + "[" * 600, "not a recipe: brackets or mappings are nested"),
    (BASE + "depth: '\0'", "not valid YAML: unacceptable character #x0000"),
    ("model: {id: x, id: y}\n" + BASE, "line 1: 'id' is given twice; keep one of them"),
    ("model: {id: x, max_memory: {0: 1GB, '0': 2GB}}\n", "line 1: '0' is given twice"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), NOT_A_RECIPE)
def test_what_is_not_a_recipe(text: str, message: str) -> None:
    """Broken or hostile YAML gives one sentence with its line, never a traceback."""
    assert problems(text)[0].startswith(message), problems(text)


def test_a_bomb_of_aliases_is_answered_at_once() -> None:
    """Nested aliases that stand for billions of values are refused without expanding them."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert max(map(len, problems("\n".join(lines) + "\nmodel: *a11"))) < 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"model: \xe9",
            "the recipe is not UTF-8 at byte 8 (0xe9); save it as UTF-8 (iconv -f LATIN1 -t UTF-8 OLD > NEW, if it is "
            "Latin-1)",
        ),
        (
            "model: 1".encode("utf-16"),
            "the recipe is UTF-16 text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8 OLD > NEW)",
        ),
        (b"model: \0", "the recipe is binary (a null byte at byte 8), not text; give a file of text"),
        (None, "the recipe cannot be read: No such file or directory; give the path of a YAML file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    """A missing or binary file is reported by name, with the remedy."""
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert str(caught.value) == f"{path}: {message}"
