"""Settings for all rooms."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A slow, shared machine is no finding; a counterexample is.
settings.register_profile("everywhere", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("everywhere")
