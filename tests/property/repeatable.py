"""How hard a property is searched: the same examples in every run, or new ones on request."""

from __future__ import annotations

import os
from typing import Final

from hypothesis import HealthCheck, settings

EXAMPLES: Final = 100
SEARCH_EXAMPLES: Final = int(os.environ.get("HYPOTHESIS_SEARCH", "0"))
"""``HYPOTHESIS_SEARCH=5000`` looks for new counterexamples; what it finds becomes an example in the test."""

repeatable: Final = settings(
    max_examples=SEARCH_EXAMPLES or EXAMPLES,
    derandomize=not SEARCH_EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
