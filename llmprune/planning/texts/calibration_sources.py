"""Sources of a recipe's calibration windows, with the number of windows from each. No text is read here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmprune.data.window_sources import source_names, sources_of_windows
from llmprune.recipe.calibration import Calibration
from llmprune.results.figures.calibration import CalibrationSource


def calibration_sources(
    calibration: Calibration, *, documents: Sequence[int] = (), commits: Mapping[str, str] | None = None
) -> tuple[CalibrationSource, ...]:
    """Return each source with its windows.

    ``documents``: number of documents of each source of text, once it is read; ``commits``: of each hub data set.
    Raises CalibrationError where a source would get no window.
    """
    shape = calibration.shape()
    sources_N = sources_of_windows(calibration)
    counts = [shape[0]] if sources_N is None else sources_N.bincount().tolist()
    texts = calibration.text_sources()
    found = []
    for index, (name, windows) in enumerate(zip(source_names(calibration), counts, strict=True)):
        source = CalibrationSource(name=name, windows=windows, tokens=windows * shape[1])
        if index < len(texts):
            source = source.with_origin(texts[index], commit=(commits or {}).get(texts[index].dataset))
            if documents:
                source = source.model_copy(update={"documents": documents[index]})
        elif not (calibration.generated and index == len(counts) - 1):
            source = source.model_copy(update={"text": calibration.tokens})
        found.append(source)
    return tuple(found)
