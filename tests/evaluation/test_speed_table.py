"""Times by part, and the speed that they predict. Times are computed from the models' configs, not measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.common.errors import EvaluationError, ModelError, RecipeError
from llmprune.cut.shape import Shape
from llmprune.evaluation.bench.generation_speed import Timing
from llmprune.evaluation.bench.measured_shape import measure_shape
from llmprune.evaluation.bench.random_models import random_models, without_middle
from llmprune.evaluation.bench.speed_measurement import measure_speed_table
from llmprune.evaluation.bench.speed_prediction import predict, require_telling
from llmprune.evaluation.bench.speed_subject import SpeedSubject
from llmprune.evaluation.bench.speed_table import read_table, speed_table, stored_table, write_table
from llmprune.recipe.evaluation import Speed
from llmprune.recipe.model import ModelSource
from llmprune.results.figures.speed_table import PartTimes, SpeedTable
from llmprune.testing import tiny_model

SETTINGS = Speed(batch_size=2, prompt_tokens=8, new_tokens=5, repeats=4)


def subject_of(family: str, **sizes: int) -> SpeedSubject:
    """Return a tiny model of a family as it is timed."""
    return SpeedSubject.of(ModelSource(id="tiny", dtype="float32"), config=tiny_model(family, **sizes).config)


@pytest.fixture(scope="module")
def llama() -> SpeedSubject:
    """Model of four layers with 96 neurons and two key-value groups."""
    return subject_of("llama")


@pytest.fixture(scope="module")
def table(llama: SpeedSubject) -> SpeedTable:
    """Table of the llama, without any noise."""
    return measure_speed_table(llama, settings=SETTINGS, time=by_config)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folder in which tables are kept."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    return tmp_path / "llmprune" / "speed"


def prefill_of(layers: int, *, width: int, groups: int, experts: int = 1) -> float:
    """Return the time of a prefill: a head, and in each layer attention by groups and MLP by width and experts."""
    return 1 + layers * (0.5 + 0.25 * groups + 0.01 * width * experts)


def by_config(model: PreTrainedModel, prompts_BL: Tensor, new_tokens: int) -> Timing:
    """Return times that follow from the model's sizes; a decoded token takes a tenth of the prefill."""
    config = model.config
    experts = getattr(config, "num_local_experts", None) or 1
    width, groups = getattr(config, "intermediate_size", 0), getattr(config, "num_key_value_heads", 0)
    first = prefill_of(config.num_hidden_layers, width=width, groups=groups, experts=experts)
    return Timing(first, (new_tokens - 1) * first / 10)


def jittered(*factors: float) -> Callable[[PreTrainedModel, Tensor, int], Timing]:
    """Return a timer whose times of smaller models vary by these factors, round after round."""
    calls: dict[int, int] = {}

    def time(model: PreTrainedModel, prompts_BL: Tensor, new_tokens: int) -> Timing:
        call = calls[id(model)] = calls.get(id(model), -1) + 1
        timing = by_config(model, prompts_BL, new_tokens)
        factor = 1.0 if model.config.intermediate_size == 96 else factors[call % len(factors)]
        return Timing(timing.first * factor, timing.rest * factor)

    return time


def never(model: PreTrainedModel, prompts_BL: Tensor, new_tokens: int) -> Timing:
    """Fail: nothing may be timed."""
    raise AssertionError("a table is kept already")


@pytest.mark.parametrize(("layers", "width", "groups"), [(4, 96, 2), (2, 32, 1), (3, 48, 1), (1, 96, 2), (4, 16, 2)])
def test_a_shape_of_a_model_whose_parts_add_up_is_predicted_exactly(
    llama: SpeedSubject, table: SpeedTable, layers: int, width: int, groups: int
) -> None:
    """At timed shapes, between and beyond them; the ratio is that of whole generations."""
    found = predict(table, Shape(layers, (("intermediate_size", width),), groups))
    prefill, dense = prefill_of(layers, width=width, groups=groups), prefill_of(4, width=96, groups=2)
    assert found.prefill == pytest.approx(prefill)
    assert found.decode == pytest.approx(prefill / 10)
    assert found.tokens_per_second == pytest.approx(2 * 5 / (1.4 * prefill))
    assert found.ratio == pytest.approx(dense / prefill)


def test_fewer_layers_take_less_in_proportion(llama: SpeedSubject, table: SpeedTable) -> None:
    """Each layer takes as long as any other, and what is outside of them stays."""
    times = [predict(table, replace(llama.shape, layers=layers)).decode for layers in (1, 2, 3)]
    assert times[1] - times[0] == pytest.approx(times[2] - times[1])
    assert times[0] - (times[1] - times[0]) == pytest.approx(table.outside.decode) == pytest.approx(0.1)


def test_fewer_tokens_take_less_outside_the_layers(llama: SpeedSubject) -> None:
    """The head's part of the time shrinks in proportion, and no layer's does; other sizes of the table stay."""

    def with_head(model: PreTrainedModel, prompts_BL: Tensor, new_tokens: int) -> Timing:
        timing, head = by_config(model, prompts_BL, new_tokens), 0.01 * model.config.vocab_size
        return Timing(timing.first + head, timing.rest + (new_tokens - 1) * head)

    table = measure_speed_table(llama, settings=SETTINGS, time=with_head)
    tokens = llama.sizes.vocabulary
    assert tokens is not None
    for layers, kept in ((4, tokens // 2), (2, tokens // 4), (4, tokens)):
        found = predict(table, replace(llama.shape, layers=layers, tokens=kept))
        prefill = prefill_of(layers, width=96, groups=2)
        assert found.prefill == pytest.approx(prefill + 0.01 * kept)
        assert found.decode == pytest.approx(prefill / 10 + 0.01 * kept)
    (model,) = random_models(llama, [replace(llama.shape, tokens=tokens // 2)])
    assert model.get_output_embeddings().weight.shape[0] == tokens // 2


def test_experts_share_the_effect_of_the_width() -> None:
    """Half of the experts of half the width take a quarter of the time."""
    mixture = subject_of("mixtral")
    table = measure_speed_table(mixture, settings=SETTINGS, time=by_config)
    found = predict(table, replace(mixture.shape, layers=3, widths=(("intermediate_size", 48),), experts=3))
    assert found.prefill == pytest.approx(prefill_of(3, width=48, groups=2, experts=3))


def test_a_model_without_widths_is_predicted_by_its_layers() -> None:
    """Where only layers can be removed, the table has one part for them."""
    subject = subject_of("mamba2")
    table = measure_speed_table(subject, settings=SETTINGS, time=by_config)
    assert (table.mlp, table.experts, [one.at for one in table.attention]) == ((), (), [1.0])
    assert predict(table, replace(subject.shape, layers=2)).prefill == pytest.approx(prefill_of(2, width=0, groups=0))


def test_of_large_layers_only_some_are_timed(llama: SpeedSubject) -> None:
    """The times of the whole model follow from a shallower one."""
    table = measure_speed_table(llama, settings=SETTINGS, time=by_config, layer_bytes=1)
    assert table.layers_timed == 2
    assert predict(table, llama.shape).prefill == pytest.approx(prefill_of(4, width=96, groups=2))


def test_models_share_weights_and_have_the_sizes_of_their_shapes(llama: SpeedSubject) -> None:
    """A model without the middle layers has the same tensors; a narrower one has others where the sizes differ."""
    narrow = replace(llama.shape, widths=(("intermediate_size", 32),))
    dense, shallow, thin = random_models(llama, (llama.shape, replace(llama.shape, layers=2), narrow))
    weights, fewer, thinner = (dict(model.named_parameters()) for model in (dense, shallow, thin))
    assert fewer["model.layers.1.mlp.up_proj.weight"] is weights["model.layers.3.mlp.up_proj.weight"]
    assert thinner["model.layers.1.self_attn.q_proj.weight"] is weights["model.layers.1.self_attn.q_proj.weight"]
    assert thinner["model.layers.1.mlp.up_proj.weight"].shape == (32, 32)
    assert without_middle(5, kept=3) == (0, 1, 4)
    tied = subject_of("gemma2")
    (model,) = random_models(tied, [tied.shape])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_table_is_measured_once_and_kept(llama: SpeedSubject, home: Path) -> None:
    """The same case is read from the cache; other numbers of tokens are measured."""
    assert stored_table(llama, settings=SETTINGS) is None
    first = speed_table(llama, settings=SETTINGS, asked=1.5, time=by_config)
    assert speed_table(llama, settings=SETTINGS, asked=1.5, time=never) == first
    assert stored_table(llama, settings=SETTINGS) == first
    shape = replace(llama.shape, layers=3)
    assert predict(stored_table(llama, settings=SETTINGS) or first, shape) == predict(first, shape)
    speed_table(llama, settings=SETTINGS.model_copy(update={"prompt_tokens": 9}), asked=1.5, time=by_config)
    kept = list(home.iterdir())
    assert len(kept) == 2
    for path in kept:
        path.write_text("{")
    assert speed_table(llama, settings=SETTINGS, asked=1.5, time=by_config) == first


def test_a_noisy_machine_is_an_error_until_it_is_quiet(llama: SpeedSubject, home: Path) -> None:
    """Rounds that differ are repeated; the error says the spread and the remedy, and a quieter machine replaces it."""
    noisy = jittered(0.6, 1.0, 1.4)
    with pytest.raises(EvaluationError, match=r"budget\.speed: 1\.2 .* of 8 rounds spreads over .*--repeats 30"):
        speed_table(llama, settings=SETTINGS, asked=1.2, time=noisy)
    kept = stored_table(llama, settings=SETTINGS)
    assert kept is not None
    assert kept.rounds == 8
    require_telling(kept, asked=3.0)
    assert speed_table(llama, settings=SETTINGS, asked=3.0, time=never) == kept
    quiet = speed_table(llama, settings=SETTINGS, asked=1.2, time=jittered(0.99, 1.0, 1.01))
    assert (quiet.rounds, quiet.uncertainty < 0.02) == (4, True)


def test_a_table_from_elsewhere_is_read_in_place_of_measurements(
    llama: SpeedSubject, table: SpeedTable, tmp_path: Path, home: Path
) -> None:
    """It may be of another device and type, and is not kept."""
    elsewhere = table.model_copy(update={"device": "NVIDIA H100", "dtype": "bfloat16"})
    write_table(tmp_path / "t.json", elsewhere)
    assert speed_table(llama, settings=SETTINGS, asked=1.5, file=str(tmp_path / "t.json"), time=never) == elsewhere
    assert not home.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory); write one with `llmprune speed"),
        ("{", "is not a speed table (JSON: "),
        ('{"model": "x"}', "is not a speed table (sizes: Field required)"),
        ("\udce9", "is not a text file"),
    ],
)
def test_a_file_that_is_no_table_is_refused(
    llama: SpeedSubject, tmp_path: Path, content: str | None, said: str
) -> None:
    """The error names the key of the recipe, the file and the remedy."""
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content, errors="surrogateescape")
    with pytest.raises(RecipeError) as refused:
        read_table(path, llama, settings=SETTINGS)
    assert f"budget.speed_table: {path} " in str(refused.value)
    assert said in str(refused.value)


def test_a_table_with_impossible_times_is_refused(llama: SpeedSubject, table: SpeedTable, tmp_path: Path) -> None:
    """Single parts may be negative, for they are differences; the time of the dense model may not."""
    damaged = table.model_copy(update={"outside": PartTimes(prefill=table.outside.prefill, decode=-9.0)})
    write_table(tmp_path / "t.json", damaged)
    with pytest.raises(RecipeError, match=r"s a token for the dense model, and both must be above zero; write one"):
        read_table(tmp_path / "t.json", llama, settings=SETTINGS)


def test_a_table_of_another_model_or_case_is_refused(llama: SpeedSubject, table: SpeedTable, tmp_path: Path) -> None:
    """The error says what differs."""
    write_table(tmp_path / "t.json", table)
    other = subject_of("llama", num_hidden_layers=3)
    with pytest.raises(RecipeError, match=r"of another model, tiny: layers 4, not 3; parameters \d+, not \d+; write"):
        read_table(tmp_path / "t.json", other, settings=SETTINGS)
    asked = SETTINGS.model_copy(update={"prompt_tokens": 9})
    with pytest.raises(
        RecipeError, match=r"with prompt_tokens 8, and budget asks for prompt_tokens 9;.*--prompt-tokens 9"
    ):
        read_table(tmp_path / "t.json", llama, settings=asked)


def test_what_cannot_be_timed_is_refused(llama: SpeedSubject) -> None:
    """More tokens than positions, and models that the memory cannot hold."""
    with pytest.raises(RecipeError, match=r"budget: prompt_tokens 8 \+ new_tokens 500 exceed the model's 128"):
        measure_speed_table(llama, settings=SETTINGS.model_copy(update={"new_tokens": 500}), time=never)
    small = ModelSource(id="tiny", dtype="float32", max_memory={"cpu": 1000})
    with pytest.raises(ModelError, match=r"tiny: the models whose speed is measured need .* and 900 B are free"):
        measure_speed_table(replace(llama, source=small), settings=SETTINGS, time=never)


def test_a_shape_is_measured_before_it_has_a_checkpoint(llama: SpeedSubject) -> None:
    """Both models generate in turn."""
    figures = measure_shape(llama, replace(llama.shape, layers=1), settings=SETTINGS)
    assert figures.alternating
    assert figures.repeats == 4
    assert figures.ratio_low <= figures.ratio <= figures.ratio_high
