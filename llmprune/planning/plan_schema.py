"""The plan of a run as one value: ``llmprune plan --json`` is its JSON, and tables and pages display it."""

from __future__ import annotations

from llmprune.planning.budget.plan import BudgetPlan
from llmprune.planning.duration.estimate import Durations
from llmprune.planning.duration.parts import RunWork
from llmprune.planning.memory.device_memory import BatchSizes, DeviceMemory
from llmprune.planning.memory.passes import Memory
from llmprune.planning.recovery.plan import RecoveryPlan
from llmprune.planning.sparsity import SparsityPlan
from llmprune.planning.vocabulary.plan import VocabularyPlan
from llmprune.results.figures.base import Figures
from llmprune.results.figures.calibration import CalibrationSource
from llmprune.results.figures.lineage import Ancestor
from llmprune.results.figures.model_size import Size
from llmprune.results.figures.next_tools import NextTools
from llmprune.results.figures.prediction_heads import PredictionHeads
from llmprune.results.figures.result_files import BaseFiles


class PlannedRound(Figures):
    """Size after a round, and the tokens that it trains on; None where the recipe gives hours."""

    size: Size
    tokens: int | None


class PlannedTask(Figures):
    """An lm-eval task or group, and the maximum number of samples of each task (None: all)."""

    name: str
    limit: int | None


class Plan(Figures):
    """Sizes, memory and disk of a run, and notes on its settings."""

    model: str
    model_type: str
    dtype: str
    dense: Size
    pruned: Size
    lineage: tuple[Ancestor, ...] = ()  # models from the first base to the one that is pruned
    parameters_exact: bool  # False where layers differ in size and the scores choose which are removed
    removed_layers: tuple[int, ...] | None  # None where the scores choose them
    keep_layers: int
    keep_widths: dict[str, int]  # by config field
    keep_experts: int | None
    keep_kv_groups: int | None  # of attention heads, in each layer
    keep_hidden: int | None = None  # residual channels; None where all are kept
    budget: BudgetPlan | None = None  # where the shape is not chosen yet; the plan is then that of a nominal one
    vocabulary: VocabularyPlan | None = None
    sparsity: SparsityPlan | None = None
    recovery: RecoveryPlan | None = None  # the training after the cut
    rounds: tuple[PlannedRound, ...] = ()  # of cut and training, where there are several
    calibration: tuple[int, int]  # windows, tokens in each
    calibration_sources: tuple[CalibrationSource, ...] = ()
    begin_of_text: str | None = None  # that windows begin with; None for none, and where the tokenizer is not here yet
    memory: Memory
    processes: int  # that share the windows, on all machines
    batch_sizes: BatchSizes
    devices: tuple[DeviceMemory, ...]  # those that compute; the main memory last, of which each process has a share
    shortage: str | None = None  # why a run on this machine is refused
    disk: int  # bytes of the result
    work: RunWork  # operations and bytes of each part of the run
    durations: Durations | None = None  # estimated from the work; None where the device's rates are not known
    base_files: BaseFiles = BaseFiles()
    tasks: tuple[PlannedTask, ...] = ()  # of the evaluation
    next_tools: NextTools | None = None  # that the shape allows; None where a search will choose the shape
    prediction_heads: PredictionHeads | None = None  # of the base's files
    lost_tools: tuple[str, ...] = ()  # a sentence, with the remedy, on those that the dense model's shape allows
    notes: tuple[str, ...]
