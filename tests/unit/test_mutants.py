"""The mutations of `make mutants` are of the product as it is: one that changes nothing would prove nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests.faults.mutants import MUTANTS, Mutant

ROOT: Final = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{mutant.row}: {mutant.says}" for mutant in MUTANTS])
def test_a_mutant_changes_one_place_of_the_product(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.new != mutant.old
