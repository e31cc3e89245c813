"""The Helm chart in charts/dcar, rendered by Helm's own library and checked against the
schemas of Kubernetes.

`tests/chart` has values, and what they render: the defaults whole, others as what they
change. After a change of the chart, `UPDATE_SNAPSHOTS=1 make test
ARGS=tests/test_chart.py` writes them anew.
"""

import difflib
import importlib
import json
import os
import re
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from app.core.settings import Settings
from app.server import FINISH_S
from tests.support.parts import needs
from tests.support.paths import ROOT

pytestmark = needs("helm")
CHART = ROOT / "charts" / "dcar"
SNAPSHOTS = ROOT / "tests" / "chart"
KEY = {"name": "keys", "key": "admin"}
OPTIONS: dict[str, dict[str, Any]] = yaml.safe_load(
    (SNAPSHOTS / "options.yaml").read_text()
)


def helm() -> Any:
    return importlib.import_module("helm_python")


def manifests(values: dict[str, Any], name: str = "shop") -> dict[str, str]:
    """Return the rendered files of a release."""
    with helm().Chart.load(CHART) as chart:
        chart.validate_schema(values)
        return dict(chart.render(values, name=name, namespace="search"))


def render(values: dict[str, Any], name: str = "shop") -> list[dict[str, Any]]:
    """Return the objects of a release."""
    objects: list[Any] = []
    for file, text in manifests(values, name).items():
        if not file.endswith("NOTES.txt"):
            objects += filter(None, yaml.safe_load_all(text))
    return objects


def notes(**values: Any) -> str:
    return manifests(values)["dcar/templates/NOTES.txt"]


def of_kind(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    (one,) = (each for each in render(values) if each["kind"] == kind)
    return dict(one)


def service(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the specification of the service's pod, and its container."""
    pod = of_kind("Deployment", values)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


def require_valid(objects: list[dict[str, Any]]) -> None:
    """Check objects against the schemas of an old and a new Kubernetes."""
    kubernetes_validate = importlib.import_module("kubernetes_validate")
    for each in objects:
        # of the Prometheus operator
        if not each["apiVersion"].startswith("monitoring.coreos.com/"):
            for version in ("1.27", "1.34"):
                kubernetes_validate.validate(each, version, strict=True)


def snapshot(values: dict[str, Any]) -> list[str]:
    """Return the lines of all that is rendered, in one order."""
    objects = sorted(
        render(values), key=lambda each: (each["kind"], each["metadata"]["name"])
    )
    for each in objects:
        # a release changes it
        each["metadata"].get("labels", {}).pop("helm.sh/chart", None)
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    text = yaml.safe_dump_all(objects, width=110) + "---\n" + notes(**values)
    return text.replace(f"dcar:{version}", "dcar:VERSION").strip().splitlines()


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_renders_what_its_snapshot_shows_and_kubernetes_accepts(
    name: str,
) -> None:
    values = OPTIONS[name]
    report = helm().lint(CHART, values, strict=True)
    assert (
        report["errors"] + [each for each in report["messages"] if each["severity"] > 1]
        == []
    )
    require_valid(render(values))
    lines = snapshot(values)
    path = SNAPSHOTS / f"{name.replace(' ', '-')}.{'diff' if values else 'yaml'}"
    if values:
        changes = difflib.unified_diff(
            snapshot({}),
            lines,
            n=2,
            lineterm="",
        )
        lines = [re.sub("^@@.*", "@@", line).rstrip() for line in changes][2:]
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text("\n".join(lines) + "\n")
    assert path.read_text().splitlines() == lines


def test_schedules_and_the_values_of_the_guide_are_accepted() -> None:
    for schedule in (
        "",
        "@every 90m",
        "*/15 0-23/2 1,15 1-12 0",
        "5  4 ? JAN-MAR mon,THU",
        "59 23 31 12 6",
    ):
        assert render(
            {"index": {"claim": "indexes"}, "rebuild": {"schedule": schedule}}
        )
    guide = (ROOT / "docs" / "how-to" / "deploy.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    require_valid(render(yaml.safe_load(example)))


def leaves(values: dict[str, Any]) -> set[tuple[str, ...]]:
    """Return the paths of all values; of those that hold names of the user's own, {} by
    default, the path to it.
    """
    paths: set[tuple[str, ...]] = set()
    for name, value in values.items():
        if isinstance(value, dict) and value:
            paths.update((name, *rest) for rest in leaves(value))
        else:
            paths.add((name,))
    return paths


def test_each_value_of_the_chart_is_in_an_option_and_changes_what_is_rendered() -> None:
    known = leaves(yaml.safe_load((CHART / "values.yaml").read_text()))
    used = set().union(*map(leaves, OPTIONS.values()))
    unused = {
        path for path in known if not any(leaf[: len(path)] == path for leaf in used)
    }
    assert unused <= {("resources", "requests", each) for each in ("cpu", "memory")}
    for option, values in OPTIONS.items():
        rendered = render(values)
        for name in values.keys() - {"index", "strategy"}:  # which others need
            assert (
                render({key: each for key, each in values.items() if key != name})
                != rendered
            ), (option, name)


def test_settings_are_those_of_the_service() -> None:
    names = json.loads((CHART / "values.schema.json").read_text())["definitions"][
        "setting"
    ]["enum"]
    assert set(names) == Settings.model_fields.keys() - {
        "index",
        "port",
        "runtime_cache",
    }, "make reference"
    variables = {
        each["name"]: each.get("value") for each in service(OPTIONS["full"])[1]["env"]
    }
    fields = {
        name.removeprefix("DCAR_").lower(): each for name, each in variables.items()
    }
    assert fields["admin_key"] is None, "its value stays in the Secret"
    known = {name: each for name, each in fields.items() if name in names}
    settings = Settings.model_validate(known | {"index": ROOT, "admin_key": "a" * 16})
    assert settings.max_k == 100
    assert settings.max_upload_bytes == 20971520
    assert settings.batch_wait_ms == 0.5


@pytest.mark.parametrize("index", [{"claim": "indexes"}, {}])
def test_the_claim_can_be_written_if_the_service_writes(index: dict[str, str]) -> None:
    for settings, is_read_only in (
        ({}, True),
        ({"writes": False}, True),
        ({"writes": "no"}, True),
        ({"feedback": "off"}, True),
        ({"writes": 1}, False),
        ({"writes": "Yes"}, False),
        ({"feedback": True}, False),
        ({"feedback": "/data/clicks"}, False),
    ):
        _, container = service(
            {"settings": settings, "index": index, "strategy": "Recreate"}
        )
        (mount,) = (
            each for each in container["volumeMounts"] if each["mountPath"] == "/data"
        )
        assert mount.get("readOnly", False) is is_read_only, settings


def test_the_chart_and_the_service_agree() -> None:
    from app.main import create_app

    pod, container = service({})
    assert pod["terminationGracePeriodSeconds"] >= 5 + FINISH_S + 5, "5: its preStop"
    paths = {
        each["httpGet"]["path"]
        for name, each in container.items()
        if name.endswith("Probe")
    }
    assert (
        paths
        == {"/healthz", "/readyz"}
        <= create_app(Settings(index=ROOT)).openapi()["paths"].keys()
    )
    names = [
        each["metadata"]["name"]
        for each in render({}, name="r" * 53)
        if each["kind"] == "Service"
    ]
    assert names == [f"{'r' * 47}-dcar"], (
        "the alerts recognize the job of the longest release"
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"settings": {"max_kk": 1}}, "max_kk"),
        ({"secretSettings": {"admin_key": "plain"}}, "admin_key"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"rebuild": {"image": "dcar"}}, "image"),
        ({"index": {"url": "s3:bucket"}}, "url"),
        ({"replica": 2}, "replica"),
        ({"strategy": "Rolling"}, "strategy"),
        ({"env": {"DCAR_MAX_K": 100}}, "DCAR_MAX_K"),
        ({"mounts": {"etc": {"emptyDir": {}}}}, "etc"),
        ({"pod": {"serviceAccount": "reads-buckets"}}, "serviceAccount"),
        *(
            (
                {"index": {"claim": "indexes"}, "rebuild": {"schedule": schedule}},
                "schedule",
            )
            for schedule in (
                "daily",
                "60 3 * * *",
                "0 24 * * *",
                "0 3 32 * *",
                "0 3 * 13 *",
                "0 3 * * 7",
                "0 3 * *",
            )
        ),
        ({"cacheSize": "lots"}, "cacheSize"),
        ({"monitoring": {"interval": "often"}}, "interval"),
        ({"rebuild": {"schedule": "0 3 * * *"}}, "needs index.claim or index.url"),
        (
            {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}},
            "minReplicas is above",
        ),
        (
            {
                "autoscaling": {"enabled": True},
                "resources": {"requests": {"cpu": None}},
            },
            "needs resources.requests.cpu",
        ),
        (
            {"settings": {"admin_key": "x"}, "secretSettings": {"admin_key": KEY}},
            "admin_key is both",
        ),
        (
            {"index": {"url": "s3://bucket/photos"}, "settings": {"feedback": True}},
            "needs feedbackClaim",
        ),
        (
            {
                "index": {"url": "s3://bucket/photos", "claim": "c"},
                "settings": {"writes": True},
            },
            "only jobs publish",
        ),
        (
            {"monitoring": {"enabled": True}, "secretSettings": {"api_keys": KEY}},
            "needs monitoring.key",
        ),
        (
            {"monitoring": {"enabled": True}, "settings": {"api_keys": "shop:abc"}},
            "needs monitoring.key",
        ),
        ({"settings": {"feedback": True}, "replicas": 2}, "needs index.claim"),
        ({"settings": {"writes": True}, "replicas": 2}, "writes needs replicas: 1"),
        ({"settings": {"writes": True}, "index": {"claim": "c"}}, "strategy: Recreate"),
        (
            {
                "settings": {"writes": "yes"},
                "autoscaling": {"enabled": True, "minReplicas": 1},
            },
            "no autoscaling",
        ),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(helm().HelmError, match=reason):
        render(values)
