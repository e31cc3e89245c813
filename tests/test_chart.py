"""The Helm chart in charts/dcar, rendered by Helm's own library and checked against the schemas of Kubernetes."""

import importlib
import json
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
STORE = {"url": "s3://bucket/photos", "credentials": "store"}
KEY = {"name": "keys", "key": "admin"}
DAILY = {"schedule": "0 3 * * *", "args": ["--gallery", "/gallery"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "full": {
        "image": {"digest": f"sha256:{'0' * 64}"},
        "imagePullSecrets": [{"name": "registry"}],
        "strategy": "Recreate",
        "settings": {"max_k": 100, "writes": True, "max_upload_bytes": 20971520, "batch_wait_ms": 0.5},
        "secretSettings": {"admin_key": KEY},
        "env": {"FORWARDED_ALLOW_IPS": "10.0.0.0/8", "OTEL_BSP_MAX_QUEUE_SIZE": 4096},
        "mounts": {
            "/etc/redis": {"secret": {"secretName": "redis-ca"}},
            "/more": {"persistentVolumeClaim": {"claimName": "more", "readOnly": True}},
        },
        "index": {"claim": "indexes", "path": "photos"},
        "gallery": {"claim": "photos", "path": "/photos"},
        "rebuild": DAILY | {"image": "dcar:full", "resources": {"limits": {"cpu": "4"}}},
        "resources": {"limits": {"memory": "4Gi"}},
        "cacheSize": "9Gi",
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "pod": {"serviceAccountName": "reads-buckets", "runtimeClassName": "nvidia", "affinity": {"nodeAffinity": {}}},
        "ingress": {
            "host": "images.example",
            "className": "nginx",
            "tlsSecret": "images",
            "annotations": {"nginx.ingress.kubernetes.io/proxy-body-size": "9m"},
        },
        "networkPolicy": {
            "from": [{"podSelector": {"matchLabels": {"app": "shop"}}}],
            "egress": [{"ports": [{"port": 6379}]}],
        },
        "monitoring": {"enabled": True, "interval": "1m", "labels": {"a": "b"}, "key": KEY},
    },
    "autoscaling": {"autoscaling": {"enabled": True, "minReplicas": 3, "maxReplicas": 9, "cpuPercent": 50}},
    "two replicas": {"replicas": 2, "networkPolicy": {"enabled": False}},
    "an image that only serves": {
        "image": {"repository": "registry.example/dcar", "tag": "1.0-serve", "pullPolicy": "Always"},
        "rebuild": {"image": "dcar:1.0"},
    },
    "weights of its own": {"index": {"claim": "indexes"}, "env": {"HF_HOME": "/weights"}},
    "object store": {"index": STORE, "feedbackClaim": "clicks"},
    "object store and rebuild": {"index": STORE, "rebuild": DAILY},
    "object store and rebuild with a claim": {"index": STORE | {"claim": "vectors"}, "rebuild": DAILY},
    "names that look like numbers": {
        "index": {"claim": "123", "credentials": "1e3"},
        "feedbackClaim": "true",
        "gallery": {"claim": "456", "path": "/a, b"},
        "rebuild": {"schedule": "@daily"},
        "cacheSize": "500",
    },
}


def helm() -> Any:
    return importlib.import_module("helm_python")


def manifests(values: dict[str, Any], name: str) -> dict[str, str]:
    with helm().Chart.load(CHART) as chart:
        chart.validate_schema(values)
        return dict(chart.render(values, name=name, namespace="search"))


def render(values: dict[str, Any], name: str = "shop") -> list[dict[str, Any]]:
    """Return the objects of a release."""
    texts = [text for file, text in manifests(values, name).items() if not file.endswith("NOTES.txt")]
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


def notes(**values: Any) -> str:
    return manifests(values, "shop")["dcar/templates/NOTES.txt"]


def of_kind(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    (one,) = (each for each in render(values) if each["kind"] == kind)
    return dict(one)


def pods(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the specifications of the pods of the service, of the job if there is one, and of the test."""
    specs = [each["spec"] for each in render(values) if each["kind"] in {"Deployment", "CronJob", "Pod"}]
    specs = [spec.get("jobTemplate", {"spec": spec})["spec"] for spec in specs]
    return [spec["template"]["spec"] if "template" in spec else spec for spec in specs]


def variables(pod: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of a container, each given once; None for those from Secrets."""
    given = pod["containers"][0].get("env", [])
    assert len({each["name"] for each in given}) == len(given)
    return {each["name"]: each.get("value") for each in given}


def mounts(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return volumes by the path at which they are mounted, and whether only to be read."""
    volumes = {each["name"]: each for each in pod["volumes"]}
    mounted = pod["containers"][0]["volumeMounts"]
    assert {each["name"] for each in mounted} == volumes.keys()
    return {each["mountPath"]: volumes[each["name"]] | {"readOnly": each.get("readOnly", False)} for each in mounted}


def require_valid(objects: list[dict[str, Any]]) -> None:
    """Check objects against the schemas of an old and a new Kubernetes."""
    kubernetes_validate = importlib.import_module("kubernetes_validate")
    for each in objects:
        if not each["apiVersion"].startswith("monitoring.coreos.com/"):  # of the Prometheus operator
            for version in ("1.27", "1.34"):
                kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("values", OPTIONS.values(), ids=OPTIONS)
def test_each_option_renders_objects_that_kubernetes_accepts(values: dict[str, Any]) -> None:
    report = helm().lint(CHART, values, strict=True)
    assert report["errors"] + [each for each in report["messages"] if each["severity"] > 1] == []
    require_valid(render(values))


def test_every_pod_is_confined() -> None:
    found = pods(OPTIONS["full"])
    assert len(found) == 3, "the service, the job and the test"
    for pod in [*found, *pods({})]:
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


def test_images_are_of_the_chart_unless_others_are_named() -> None:
    def images(values: dict[str, Any]) -> list[str]:
        return [each["image"] for pod in pods(values) for each in [*pod.get("initContainers", []), *pod["containers"]]]

    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert images({}) == [f"dcar:{version}"] * 3
    assert images(OPTIONS["full"])[:2] == [f"dcar@sha256:{'0' * 64}", "dcar:full"]
    serving = "registry.example/dcar:1.0-serve"
    assert images(OPTIONS["an image that only serves"]) == ["dcar:1.0", serving, serving], "indexing has its own"


def test_an_index_in_an_object_store_needs_no_claim() -> None:
    for name in ("object store and rebuild", "object store and rebuild with a claim"):
        service, job, test = pods(OPTIONS[name])
        assert variables(service).get("DCAR_INDEX") == STORE["url"]
        assert job["containers"][0]["args"] == ["--gallery", "/gallery", "--out", STORE["url"]]
        for pod in (service, job):
            assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": STORE["credentials"]}}]
            assert "initContainers" not in pod
        assert "envFrom" not in test["containers"][0]
        assert mounts(service).keys() == {"/tmp", "/cache"}, "replicas do not wait for the job's claim"
        assert "HF_HOME" not in variables(service)
        is_claimed = "claim" in name
        assert mounts(job).keys() == {"/tmp", "/cache", *(["/data"] if is_claimed else [])}
        kept = {"DCAR_RUNTIME_CACHE": "/data", "HF_HOME": "/data/hub"}
        assert variables(job) == (kept if is_claimed else {}), "its vectors stay on the claim"
    service, _ = pods(OPTIONS["object store"])
    assert variables(service)["DCAR_FEEDBACK"] == "/feedback"
    assert mounts(service)["/feedback"]["persistentVolumeClaim"] == {"claimName": "clicks"}


def test_variables_mounts_and_weights_reach_service_and_job() -> None:
    full = OPTIONS["full"]
    service, job, test = pods(full)
    for pod in (service, job):
        assert (
            variables(pod).items() >= {"FORWARDED_ALLOW_IPS": "10.0.0.0/8", "OTEL_BSP_MAX_QUEUE_SIZE": "4096"}.items()
        )
        assert variables(pod)["HF_HOME"] == "/data/hub", "the network policy keeps the service from the hub"
        assert {"/data", "/photos"} <= mounts(pod).keys()
        for path, source in full["mounts"].items():
            assert mounts(pod)[path].items() >= {**source, "readOnly": True}.items()
    assert [each["name"] for each in test["volumes"]] == ["tmp", "cache"], "the test waits for no claim"
    assert "HF_HOME" not in variables(pods({})[0])
    assert variables(pods(OPTIONS["weights of its own"])[0])["HF_HOME"] == "/weights"
    service, job, _ = pods(OPTIONS["names that look like numbers"])
    assert mounts(job).keys() == {"/data", "/tmp", "/cache", "/a, b"}
    assert mounts(service)["/feedback"]["persistentVolumeClaim"] == {"claimName": "true"}


def test_a_network_policy_with_peers_admits_the_test_too() -> None:
    policy, test = (of_kind(kind, OPTIONS["full"]) for kind in ("NetworkPolicy", "Pod"))
    shop, own = (each["podSelector"]["matchLabels"] for each in policy["spec"]["ingress"][0]["from"])
    assert shop == {"app": "shop"}
    assert own == test["metadata"]["labels"] != policy["spec"]["podSelector"]["matchLabels"]
    assert "from" not in of_kind("NetworkPolicy", {})["spec"]["ingress"][0]


def test_a_pod_can_end_before_its_successor_starts() -> None:
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0}}
    for name, strategy in (("defaults", rolling), ("full", {"type": "Recreate"})):
        assert of_kind("Deployment", OPTIONS[name])["spec"]["strategy"] == strategy


def test_schedules_and_the_values_of_the_guide_are_accepted() -> None:
    for schedule in ("", "@every 90m", "*/15 0-23/2 1,15 1-12 0", "5  4 ? JAN-MAR mon,THU", "59 23 31 12 6"):
        assert render({"index": {"claim": "indexes"}, "rebuild": {"schedule": schedule}})
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
    known = leaves(yaml.safe_load((CHART / "values.yaml").read_text()))
    used = {leaf for values in OPTIONS.values() for leaf in leaves(values)}
    unused = {path for path in known if not any(leaf[: len(path)] == path for leaf in used)}
    assert unused <= {("resources", "requests", each) for each in ("cpu", "memory")}
    for option, values in OPTIONS.items():
        rendered = render(values)
        for name in values.keys() - {"index", "strategy"}:  # which others need
            assert render({key: each for key, each in values.items() if key != name}) != rendered, (option, name)


def test_settings_are_those_of_the_service() -> None:
    names = json.loads((CHART / "values.schema.json").read_text())["definitions"]["setting"]["enum"]
    assert set(names) == Settings.model_fields.keys() - {"index", "port", "runtime_cache"}, "make reference"
    fields = {name.removeprefix("DCAR_").lower(): each for name, each in variables(pods(OPTIONS["full"])[0]).items()}
    assert fields["admin_key"] is None, "its value stays in the Secret"
    known = {name: each for name, each in fields.items() if name in names}
    settings = Settings.model_validate(known | {"index": ROOT, "admin_key": "a" * 8})
    assert (settings.max_k, settings.max_upload_bytes, settings.batch_wait_ms) == (100, 20971520, 0.5)


@pytest.mark.parametrize(
    ("settings", "is_read_only"),
    [
        ({}, True), ({"writes": False}, True), ({"writes": "no"}, True), ({"feedback": "off"}, True),
        ({"writes": 1}, False), ({"writes": "Yes"}, False), ({"feedback": True}, False),
        ({"feedback": "/data/clicks"}, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("index", [{"claim": "indexes"}, {}])
def test_the_claim_can_be_written_if_the_service_writes(
    settings: dict[str, Any], is_read_only: bool, index: dict[str, str]
) -> None:
    assert (
        mounts(pods({"settings": settings, "index": index, "strategy": "Recreate"})[0])["/data"]["readOnly"]
        is is_read_only
    )


def test_pods_go_on_until_nobody_sends_them_requests() -> None:
    (pod, _) = pods({})
    (container,) = pod["containers"]
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "5"]
    assert pod["terminationGracePeriodSeconds"] >= 5 + FINISH_S + 5


def test_the_alerts_recognize_the_job_of_the_longest_release() -> None:
    names = [each["metadata"]["name"] for each in render({}, name="r" * 53) if each["kind"] == "Service"]
    assert names == [f"{'r' * 47}-dcar"]


def test_probes_and_the_test_ask_for_paths_of_the_service() -> None:
    from app.main import create_app

    (container,), (test,) = (pod["containers"] for pod in pods({}))
    paths = {each["httpGet"]["path"] for name, each in container.items() if name.endswith("Probe")}
    assert paths == {"/healthz", "/readyz"} <= create_app(Settings(index=ROOT)).openapi()["paths"].keys()
    assert f'"http://{of_kind("Service", {})["metadata"]["name"]}/readyz"' in test["command"][-1]


def test_the_notes_name_a_network_policy_that_blocks_the_store() -> None:
    remote = ({"redis_url": "redis://redis"}, {"tracing": True}, {"image_hosts": "pictures.example"})
    assert "networkPolicy.egress" in notes(index=STORE)
    assert all("networkPolicy.egress" in notes(settings=settings) for settings in remote)
    assert "networkPolicy.egress" not in notes()
    assert "networkPolicy.egress" not in notes(index=STORE, networkPolicy={"egress": [{"ports": [{"port": 443}]}]})


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
            for schedule in ("daily", "60 3 * * *", "0 24 * * *", "0 3 32 * *", "0 3 * 13 *", "0 3 * * 7", "0 3 * *")
        ),
        ({"cacheSize": "lots"}, "cacheSize"),
        ({"monitoring": {"interval": "often"}}, "interval"),
        ({"rebuild": {"schedule": "0 3 * * *"}}, "needs index.claim or index.url"),
        ({"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}}, "minReplicas is above"),
        ({"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}}, "needs resources.requests.cpu"),
        ({"settings": {"admin_key": "x"}, "secretSettings": {"admin_key": KEY}}, "admin_key is both"),
        ({"index": {"url": "s3://bucket/photos"}, "settings": {"feedback": True}}, "needs feedbackClaim"),
        ({"index": {"url": "s3://bucket/photos", "claim": "c"}, "settings": {"writes": True}}, "only jobs publish"),
        ({"monitoring": {"enabled": True}, "secretSettings": {"api_keys": KEY}}, "needs monitoring.key"),
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
