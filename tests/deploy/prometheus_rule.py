"""The PrometheusRule of docs/deploy/kubernetes, made from metrics/monitoring/rules.yml.

python -m tests.deploy.prometheus_rule    writes it
"""

from __future__ import annotations

from textwrap import indent

from tests.support.processes import ROOT

RULES = ROOT / "metrics" / "monitoring" / "rules.yml"
WRITTEN = ROOT / "docs" / "deploy" / "kubernetes" / "prometheus" / "rules.yaml"

HEAD = """\
# metrics/monitoring/rules.yml as the Prometheus operator takes it:
# python -m tests.deploy.prometheus_rule writes it, and a test holds the two equal.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: stepspan
  labels:
    app.kubernetes.io/name: stepspan
spec:
"""


def prometheus_rule() -> str:
    """The manifest's text; the rules are indented, and keep their comments."""
    _, groups = RULES.read_text().split("\ngroups:\n")
    return HEAD + indent("groups:\n" + groups, "  ")


if __name__ == "__main__":
    WRITTEN.write_text(prometheus_rule())
