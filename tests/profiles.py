"""How many examples Hypothesis tries: few in the suite, the same each time; many by hand.

`--hypothesis-profile=many` makes each of the tests that ask for `few` try thousands, drawn anew.
"""

from hypothesis import HealthCheck, settings

MANY = "many"
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

settings.register_profile(MANY, max_examples=2000, deadline=None, suppress_health_check=_SLOW)


def few(count: int) -> settings:
    """So many, or as many as the profile says."""
    if settings.get_current_profile_name() == MANY:
        return settings()
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        suppress_health_check=_SLOW,
        database=None,
    )
