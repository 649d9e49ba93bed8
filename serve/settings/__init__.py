"""The service's settings: read once from the environment, then frozen.

`service.py` has the fields, `telemetry.py` those of telemetry, and `environment.py` reads them.
Others import from here, and from the files only what is about one kind of setting.
"""

from serve.settings.environment import environment_name, load_settings, variables_without_effect
from serve.settings.service import (
    DEMO_MODEL,
    MOST_STEPS,
    PREFIX,
    RANDOM_SDXL_BASE,
    SDXL_BASE,
    SDXL_BASE_COMMIT,
    SchedulerName,
    ServeSettings,
)

__all__ = [
    "DEMO_MODEL",
    "MOST_STEPS",
    "PREFIX",
    "RANDOM_SDXL_BASE",
    "SDXL_BASE",
    "SDXL_BASE_COMMIT",
    "SchedulerName",
    "ServeSettings",
    "environment_name",
    "load_settings",
    "variables_without_effect",
]
