"""What anybody's method, source, statistic or evaluator must pass to work in stockpot: run it over your own.

    import pytest
    from stockpot.testing import method_checks

    @pytest.mark.parametrize("check", method_checks("my_method"), ids=lambda c: c.name)
    def test_my_method(check, tmp_path):
        check(tmp_path)

Checks raise AssertionError with what was found; they need numpy and nothing else, and no pytest.
"""

from stockpot.testing.checks import Check, run_checks
from stockpot.testing.evaluators import evaluator_checks
from stockpot.testing.methods import method_checks
from stockpot.testing.sources import source_checks
from stockpot.testing.statistics import statistic_checks

__all__ = ["Check", "evaluator_checks", "method_checks", "run_checks", "source_checks", "statistic_checks"]
