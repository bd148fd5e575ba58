"""Write the PrometheusRule of deploy/kubernetes: the groups of deploy/prometheus/rules.yml, as they stand.

python deploy/kubernetes/make_prometheus_rule.py
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
RULES = HERE.parent / "prometheus" / "rules.yml"
TARGET = HERE / "components" / "monitoring" / "prometheus-rule.yaml"

HEAD = """\
# Written by deploy/kubernetes/make_prometheus_rule.py from deploy/prometheus/rules.yml: change that.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: qaa-serve
  labels: {app.kubernetes.io/name: qaa-serve}
spec:
"""


def prometheus_rule() -> str:
    """The manifest's text."""
    rules = RULES.read_text(encoding="utf-8")
    groups = rules[rules.index("\ngroups:") + 1 :]
    return HEAD + "".join(f"  {line}\n" if line else "\n" for line in groups.splitlines())


if __name__ == "__main__":
    TARGET.write_text(prometheus_rule(), encoding="utf-8")
