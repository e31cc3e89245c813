"""The Helm chart in charts/dcar, rendered by Helm's own library and checked against the schemas of Kubernetes."""

import importlib
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from app.core.settings import Settings
from tests.support.parts import needs
from tests.support.paths import ROOT

pytestmark = needs("helm")
CHART = ROOT / "charts" / "dcar"
DIGEST = f"sha256:{'0' * 64}"
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "two replicas": {"replicas": 2},
    "autoscaling": {"autoscaling": {"enabled": True, "minReplicas": 3, "maxReplicas": 9, "cpuPercent": 50}},
    "rebuild": {
        "index": {"claim": "indexes", "path": "photos"},
        "rebuild": {
            "schedule": "0 3 * * *",
            "image": "dcar:full",
            "args": ["--gallery", "/gallery"],
            "resources": {"limits": {"cpu": "4"}},
        },
    },
    "gallery": {"gallery": {"claim": "photos", "path": "/photos"}},
    "digest": {"image": {"digest": DIGEST}, "imagePullSecrets": [{"name": "registry"}]},
    "settings": {
        "settings": {"max_k": 100, "writes": True, "max_upload_bytes": 20971520, "batch_wait_ms": 0.5},
        "secretSettings": {"admin_key": {"name": "keys", "key": "admin"}},
    },
    "network": {
        "networkPolicy": {
            "from": [{"podSelector": {"matchLabels": {"app": "shop"}}}],
            "egress": [{"ports": [{"port": 6379}]}],
        }
    },
    "image": {"image": {"repository": "registry.example/dcar", "tag": "1.2", "pullPolicy": "Always"}},
    "resources": {"resources": {"limits": {"memory": "4Gi"}}, "cacheSize": "9Gi"},
    "no network policy": {"networkPolicy": {"enabled": False}},
    "monitoring": {
        "monitoring": {
            "enabled": True,
            "interval": "1m",
            "labels": {"release": "prometheus"},
            "key": {"name": "keys", "key": "scrape"},
        }
    },
    "object store": {"index": {"url": "s3://bucket/photos", "credentials": "store"}},
    "feedback": {"feedbackClaim": "clicks"},
    "nodes": {"nodeSelector": {"disk": "ssd"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]},
    "strategy": {"strategy": "Recreate"},
    "variables": {"env": {"FORWARDED_ALLOW_IPS": "10.0.0.0/8", "OTEL_BSP_MAX_QUEUE_SIZE": 4096}},
    "mounts": {
        "mounts": {
            "/etc/redis": {"secret": {"secretName": "redis-ca"}},
            "/more": {"persistentVolumeClaim": {"claimName": "more", "readOnly": True}},
        }
    },
    "pods": {
        "pod": {
            "serviceAccountName": "reads-buckets",
            "priorityClassName": "high",
            "runtimeClassName": "nvidia",
            "affinity": {"nodeAffinity": {}},
        }
    },
}
ALL: dict[str, Any] = {key: value for values in list(OPTIONS.values())[3:8] for key, value in values.items()}
for _name in ("monitoring", "nodes", "strategy", "variables", "mounts", "pods"):
    ALL |= OPTIONS[_name]


def helm() -> Any:
    return importlib.import_module("helm_python")


def render(values: dict[str, Any], name: str = "shop") -> list[dict[str, Any]]:
    """Return the objects of a release."""
    with helm().Chart.load(CHART) as chart:
        chart.validate_schema(values)
        manifests = chart.render(values, name=name, namespace="search")
    del manifests["dcar/templates/NOTES.txt"]
    return [each for text in manifests.values() for each in yaml.safe_load_all(text) if each]


def notes(**values: Any) -> str:
    with helm().Chart.load(CHART) as chart:
        return str(chart.render(values, name="shop", namespace="search")["dcar/templates/NOTES.txt"])


def of_kind(kind: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in render(values) if each["kind"] == kind]


def pods(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for each in objects:
        spec = each.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if each["kind"] == "Pod" or "template" in spec:
            yield each["spec"] if each["kind"] == "Pod" else spec["template"]["spec"]


def variables(container: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of a container, each given once; None for those from Secrets."""
    found = {each["name"]: each.get("value") for each in container.get("env", [])}
    assert len(found) == len(container.get("env", []))
    return found


def require_valid(objects: list[dict[str, Any]]) -> None:
    """Check objects against the schemas of an old and a new Kubernetes."""
    kubernetes_validate = importlib.import_module("kubernetes_validate")
    for each in objects:
        if not each["apiVersion"].startswith("monitoring.coreos.com/"):  # of the Prometheus operator
            for version in ("1.27", "1.34"):
                kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("values", [*OPTIONS.values(), ALL], ids=[*OPTIONS, "all"])
def test_each_option_renders_objects_that_kubernetes_accepts(values: dict[str, Any]) -> None:
    report = helm().lint(CHART, values, strict=True)
    assert report["errors"] == []
    assert [each for each in report["messages"] if each["severity"] > 1] == []
    require_valid(render(values))


def test_names_that_look_like_numbers_stay_names() -> None:
    values: dict[str, Any] = {
        "index": {"claim": "123", "credentials": "1e3"},
        "feedbackClaim": "true",
        "gallery": {"claim": "456", "path": "/a, b"},
        "rebuild": {"schedule": "0 3 * * *"},
        "cacheSize": "500",
    }
    objects = render(values, name="789")
    require_valid(objects)
    service, job, _ = pods(objects)
    assert [each["mountPath"] for each in job["containers"][0]["volumeMounts"]] == ["/data", "/tmp", "/cache", "/a, b"]
    assert {"claimName": "true"} in [each.get("persistentVolumeClaim") for each in service["volumes"]]


@pytest.mark.parametrize(
    "schedule",
    ["", "@daily", "@every 90m", "0 3 * * *", "*/15 0-23/2 1,15 1-12 0", "5  4 ? JAN-MAR mon,THU", "59 23 31 12 6"],
)
def test_schedules_of_kubernetes_are_accepted(schedule: str) -> None:
    assert render({"index": {"claim": "indexes"}, "rebuild": {"schedule": schedule}})


def test_the_values_of_the_guide_are_accepted() -> None:
    guide = (ROOT / "docs" / "how-to" / "deploy.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    require_valid(render(yaml.safe_load(example)))


def leaves(values: dict[str, Any]) -> set[tuple[str, ...]]:
    """Return the paths of all values; of those that hold names of the user's own, {} by default, the path to it."""
    return {
        (name, *rest)
        for name, value in values.items()
        for rest in (leaves(value) if isinstance(value, dict) and value else [()])
    }


def test_each_value_of_the_chart_is_an_option_above_and_changes_what_is_rendered() -> None:
    known, used = leaves(yaml.safe_load((CHART / "values.yaml").read_text())), set[tuple[str, ...]]()
    default = render({})
    for name, values in OPTIONS.items():
        used |= {path for path in known if any(each[: len(path)] == path for each in leaves(values))}
        assert name == "defaults" or render(values) != default, name
    assert known - used <= {("resources", "requests", each) for each in ("cpu", "memory")}


def test_every_pod_is_confined() -> None:
    found = list(pods(render(ALL)))
    assert len(found) == 3, "the service, the job and the test"
    for pod in [*found, *pods(render({}))]:
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        assert {"cache", "tmp"} <= {each["name"] for each in pod["volumes"] if "emptyDir" in each}


def test_the_image_is_taken_by_its_digest() -> None:
    (deployment,) = of_kind("Deployment", OPTIONS["digest"])
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == f"dcar@{DIGEST}"


def test_indexing_has_an_image_of_its_own_beside_one_that_only_serves() -> None:
    values: dict[str, Any] = {"image": {"tag": "1.0-serve"}, "rebuild": {"image": "dcar:1.0"}}
    service, test = pods(render(values))
    assert [service["containers"][0]["image"], test["containers"][0]["image"]] == ["dcar:1.0-serve"] * 2
    assert service["initContainers"][0]["image"] == "dcar:1.0", "which indexes the bundled emoji"
    values |= {"index": {"claim": "indexes"}, "rebuild": {"schedule": "@daily", "image": "dcar:1.0"}}
    _, job, _ = pods(render(values))
    assert job["containers"][0]["image"] == "dcar:1.0"


def test_an_index_in_an_object_store_needs_no_claim() -> None:
    index = {"url": "s3://bucket/photos", "credentials": "store"}
    values: dict[str, Any] = {"index": index, "rebuild": {"schedule": "0 3 * * *", "args": ["--gallery", "/gallery"]}}
    service, job, test = pods(render(values))
    (container,), (builder,), (connection,) = service["containers"], job["containers"], test["containers"]
    assert {"name": "DCAR_INDEX", "value": index["url"]} in container["env"]
    assert builder["args"] == ["--gallery", "/gallery", "--out", index["url"]]
    assert container["envFrom"] == builder["envFrom"] == [{"secretRef": {"name": "store"}}]
    for pod in (service, job, test):
        assert "initContainers" not in pod
        assert [each["name"] for each in pod["volumes"]] == ["tmp", "cache"]
    assert "envFrom" not in connection
    (claimed,) = pods(of_kind("Pod", ALL))
    assert [each["name"] for each in claimed["volumes"]] == ["tmp", "cache"], "the test waits for no claim"
    values["index"]["claim"] = "vectors"
    service, job, _ = pods(render(values))
    assert [each["name"] for each in service["volumes"]] == ["tmp", "cache"], "replicas do not wait for the job's claim"
    assert {"name": "index", "mountPath": "/data"} in job["containers"][0]["volumeMounts"]
    kept = {"DCAR_RUNTIME_CACHE": "/data", "HF_HOME": "/data/hub"}
    assert variables(job["containers"][0]) == kept, "its vectors stay there"
    assert "HF_HOME" not in variables(service["containers"][0])


def test_settings_are_those_of_the_service() -> None:
    names = json.loads((CHART / "values.schema.json").read_text())["definitions"]["setting"]["enum"]
    assert set(names) == Settings.model_fields.keys() - {"index", "port", "runtime_cache"}, "make reference"
    (deployment,) = of_kind("Deployment", OPTIONS["settings"])
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    given = variables(container)
    assert given.pop("DCAR_ADMIN_KEY") is None, "its value stays in the Secret"
    fields = {name.removeprefix("DCAR_").lower(): value for name, value in given.items()}
    settings = Settings.model_validate(fields | {"admin_key": "a" * 8})
    assert (settings.max_k, settings.max_upload_bytes, settings.batch_wait_ms) == (100, 20971520, 0.5)
    assert settings.drain_s == 5, "the chart's own"
    assert next(each for each in container["volumeMounts"] if each["name"] == "index")["readOnly"] is False


@pytest.mark.parametrize(
    ("settings", "is_read_only"),
    [
        ({}, True), ({"writes": False}, True), ({"writes": "no"}, True), ({"feedback": "off"}, True),
        ({"writes": 1}, False), ({"writes": "Yes"}, False), ({"feedback": True}, False),
        ({"feedback": "/data/clicks"}, False),
    ],
)  # fmt: skip
def test_the_claim_can_be_written_if_the_service_writes(settings: dict[str, Any], is_read_only: bool) -> None:
    for index in ({"claim": "indexes"}, {}):
        (deployment,) = of_kind("Deployment", {"settings": settings, "index": index, "strategy": "Recreate"})
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        (mount,) = (each for each in container["volumeMounts"] if each["name"] == "index")
        assert mount["readOnly"] is is_read_only


def test_weights_that_the_job_fetches_are_on_the_claim_for_the_service() -> None:
    service, job, _ = pods(render({"index": {"claim": "indexes"}, "rebuild": {"schedule": "@daily"}}))
    for (container,) in (service["containers"], job["containers"]):
        assert variables(container)["HF_HOME"] == "/data/hub", "the network policy keeps the service from the hub"
        assert "/data" in [each["mountPath"] for each in container["volumeMounts"]]
    service, _ = pods(render({}))
    assert "HF_HOME" not in variables(service["containers"][0])
    service, _ = pods(render({"index": {"claim": "indexes"}, "env": {"HF_HOME": "/weights"}}))
    assert variables(service["containers"][0])["HF_HOME"] == "/weights"


def test_variables_and_mounts_reach_service_and_job() -> None:
    values = OPTIONS["variables"] | OPTIONS["mounts"] | OPTIONS["rebuild"]
    service, job, test = pods(render(values))
    for pod in (service, job):
        (container,) = pod["containers"]
        given = variables(container)
        assert (given["FORWARDED_ALLOW_IPS"], given["OTEL_BSP_MAX_QUEUE_SIZE"]) == ("10.0.0.0/8", "4096")
        sources = {each["name"]: each for each in pod["volumes"]}
        mounted = {each["mountPath"]: each for each in container["volumeMounts"]}
        assert {each["name"] for each in mounted.values()} == sources.keys()
        for path, source in values["mounts"].items():
            assert mounted[path]["readOnly"] is True
            assert sources[mounted[path]["name"]].items() >= source.items()
    assert [each["name"] for each in test["volumes"]] == ["tmp", "cache"], "the test waits for no claim"


@pytest.mark.parametrize(("drain_s", "grace_s"), [(None, 40), (0, 35), (60, 95), ("60", 95), (0.5, 36)])
def test_pods_have_time_to_drain_before_they_are_killed(drain_s: object, grace_s: int) -> None:
    (pod, _) = pods(render({"settings": {} if drain_s is None else {"drain_s": drain_s}}))
    assert pod["terminationGracePeriodSeconds"] == grace_s


def test_a_pod_can_end_before_its_successor_starts() -> None:
    (deployment,) = of_kind("Deployment", {})
    assert deployment["spec"]["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0}}
    (deployment,) = of_kind("Deployment", OPTIONS["strategy"])
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}


def test_without_a_tag_the_image_is_of_the_version_of_the_chart() -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    service, test = pods(render({}))
    assert service["containers"][0]["image"] == test["containers"][0]["image"] == f"dcar:{version}"


def test_the_alerts_recognize_the_job_of_the_longest_release() -> None:
    (service,) = (each for each in render({}, name="r" * 53) if each["kind"] == "Service")
    assert service["metadata"]["name"] == f"{'r' * 47}-dcar"


def test_feedback_has_a_claim_of_its_own_beside_an_object_store() -> None:
    (deployment,) = of_kind("Deployment", {"index": {"url": "s3://bucket/photos"}, "feedbackClaim": "clicks"})
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert {"name": "DCAR_FEEDBACK", "value": "/feedback"} in container["env"]
    assert {"name": "feedback", "mountPath": "/feedback"} in container["volumeMounts"]


def test_a_network_policy_with_peers_admits_the_test_too() -> None:
    (policy,) = of_kind("NetworkPolicy", OPTIONS["network"])
    (test,) = of_kind("Pod", OPTIONS["network"])
    (shop, own) = (each["podSelector"]["matchLabels"] for each in policy["spec"]["ingress"][0]["from"])
    assert shop == {"app": "shop"}
    assert own == test["metadata"]["labels"]
    assert own != policy["spec"]["podSelector"]["matchLabels"]
    (policy,) = of_kind("NetworkPolicy", {})
    assert "from" not in policy["spec"]["ingress"][0]


def test_the_notes_name_a_network_policy_that_blocks_the_store() -> None:
    index = {"url": "s3://bucket/photos"}
    assert "networkPolicy.egress" in notes(index=index)
    assert "networkPolicy.egress" not in notes(index=index, networkPolicy={"egress": [{"ports": [{"port": 443}]}]})
    for settings in ({"redis_url": "redis://redis"}, {"tracing": True}, {"image_hosts": "pictures.example"}):
        assert "networkPolicy.egress" in notes(settings=settings)
    assert "networkPolicy.egress" not in notes()


def test_the_notes_say_how_an_empty_claim_gets_its_first_index() -> None:
    run = "kubectl --namespace search create job --from=cronjob/shop-dcar first"
    assert run in notes(index={"claim": "indexes"}, rebuild={"schedule": "@daily"})
    assert "create job" not in notes(index={"claim": "indexes"})


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
            ({"index": {"claim": "indexes"}, "rebuild": {"schedule": schedule}}, "schedule")
            for schedule in (
                "every day",
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
        ({"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}}, "minReplicas is above"),
        ({"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}}, "needs resources.requests.cpu"),
        (
            {"settings": {"admin_key": "x"}, "secretSettings": {"admin_key": {"name": "k", "key": "k"}}},
            "admin_key is both",
        ),
        ({"index": {"url": "s3://bucket/photos"}, "settings": {"feedback": True}}, "needs feedbackClaim"),
        ({"index": {"url": "s3://bucket/photos", "claim": "c"}, "settings": {"writes": True}}, "only jobs publish"),
        (
            {"monitoring": {"enabled": True}, "secretSettings": {"api_keys": {"name": "k", "key": "k"}}},
            "needs monitoring.key",
        ),
        ({"monitoring": {"enabled": True}, "settings": {"api_keys": "shop:abc"}}, "needs monitoring.key"),
        ({"settings": {"feedback": True}, "replicas": 2}, "needs index.claim"),
        ({"settings": {"writes": True}, "replicas": 2}, "writes needs replicas: 1"),
        ({"settings": {"writes": True}, "index": {"claim": "c"}}, "strategy: Recreate"),
        ({"settings": {"writes": "yes"}, "autoscaling": {"enabled": True, "minReplicas": 1}}, "no autoscaling"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(helm().HelmError, match=reason):
        render(values)


def test_probes_and_the_test_ask_for_paths_of_the_service() -> None:
    from app.main import create_app

    (deployment,) = of_kind("Deployment", {})
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    paths = {each["httpGet"]["path"] for name, each in container.items() if name.endswith("Probe")}
    assert paths == {"/healthz", "/readyz"}
    known = create_app(Settings(index=ROOT)).openapi()["paths"]
    assert paths <= known.keys()
    (service,) = of_kind("Service", {})
    (test,) = of_kind("Pod", {})
    assert f'"http://{service["metadata"]["name"]}/readyz"' in test["spec"]["containers"][0]["command"][-1]
