"""The example files agree with the commands they start."""

import inspect
from pathlib import Path

import yaml

from calm.cli.serve import serve

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_kubernetes_manifest_starts_a_server_with_options_that_exist():
    deployment, service = yaml.safe_load_all((EXAMPLES / "kubernetes" / "serve.yaml").read_text(encoding="utf-8"))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    given = [each for each in container["args"] if each.startswith("--")]
    known = {"--" + name.replace("_", "-") for name in inspect.signature(serve).parameters}
    assert given
    assert set(given) <= known
    timeout = float(container["args"][container["args"].index("--shutdown-timeout") + 1])
    assert timeout < deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["containerPort"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
