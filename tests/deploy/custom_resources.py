"""Check custom resources against models of their definitions; run by the Python of .deploy-tools.

    python tests/deploy/custom_resources.py FILE.yaml ...

The models check types and required fields, and drop fields that the definition does not have. So a
field that does not come back is an unknown one.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

KINDS = {"ScaledObject": ScaledObject, "PodMonitor": PodMonitor, "PrometheusRule": PrometheusRule}


def dropped(given: Any, known: Any, where: str) -> Iterator[str]:
    if isinstance(given, dict):
        for name, value in given.items():
            if not isinstance(known, dict) or name not in known:
                yield f"{where}.{name}"
            else:
                yield from dropped(value, known[name], f"{where}.{name}")
    elif isinstance(given, list):
        for index, value in enumerate(given):
            yield from dropped(value, known[index], f"{where}[{index}]")


if __name__ == "__main__":
    for file in sys.argv[1:]:
        resource = yaml.safe_load(Path(file).read_text())
        model = KINDS[resource["kind"]].model_validate(resource)
        known = model.model_dump(by_alias=True, mode="json")
        if unknown := list(dropped(resource["spec"], known["spec"], "spec")):
            sys.exit(f"{file}: {', '.join(unknown)} unknown")
