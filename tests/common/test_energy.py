"""Energy of a block of work, from counters of the CPU packages and from sensors of power."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmprune.common.energy import EnergyMeter, own_meters, total_kilowatt_hours


def counter(folder: Path, microjoules: int) -> Path:
    """Write the files of a CPU package's energy counter with a range of 10 kJ."""
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("10000000000\n")
    return folder


@pytest.mark.parametrize(("before", "after", "joules"), [(1_000_000, 7_201_000_000, 7200), (9_999_000_000, 0, 1)])
def test_the_counters_of_all_packages_are_added(tmp_path: Path, before: int, after: int, joules: float) -> None:
    """A counter that has started again at 0 is continued; parts of a package, which it includes, do not count."""
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        counter(tmp_path / name, before)
    with EnergyMeter(own_meters(tmp_path)) as meter:
        assert meter.kilowatt_hours is None
        for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
            counter(tmp_path / name, after)
    assert meter.kilowatt_hours == pytest.approx(2 * joules / 3.6e6)
    assert total_kilowatt_hours(meter) == meter.kilowatt_hours


def test_without_a_meter_the_energy_is_unknown(tmp_path: Path) -> None:
    """A machine without counters, and a counter that may not be read or breaks off, give None and no error."""
    failing = counter(tmp_path / "intel-rapl:0", 5)
    (failing / "energy_uj").unlink()
    for folder in (tmp_path / "none", tmp_path):
        with EnergyMeter(own_meters(folder)) as meter:
            pass
        assert meter.kilowatt_hours is None
        assert total_kilowatt_hours(meter) is None
    counter(failing, 5)
    with EnergyMeter(own_meters(tmp_path)) as meter:
        (failing / "energy_uj").unlink()
    assert meter.kilowatt_hours is None


def test_the_block_s_own_error_is_raised(tmp_path: Path) -> None:
    """The meter hides no error of the work."""
    counter(tmp_path / "intel-rapl:0", 5)
    with pytest.raises(ZeroDivisionError), EnergyMeter(own_meters(tmp_path)):
        raise ZeroDivisionError
