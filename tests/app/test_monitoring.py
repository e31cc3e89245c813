"""The dashboard and the alerts: each query parses, and asks for metrics, labels and values that the service has."""

import importlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from app.core.settings import Settings
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.processes import free_port
from tests.support.service import serving

pytestmark = needs("promql")
DASHBOARD = json.loads((ROOT / "monitoring" / "dashboard.json").read_text())
ALERTS = yaml.safe_load((ROOT / "charts" / "dcar" / "alerts.yaml").read_text())
TARGETS = [(panel["title"], each) for panel in DASHBOARD["panels"] for each in panel["targets"]]
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
QUERIES = {
    **{f"{title} {target['refId']}": (target["expr"], target["legendFormat"]) for title, target in TARGETS},
    **{rule["alert"]: (rule["expr"], rule["annotations"]["summary"]) for rule in RULES},
}
TARGET_LABELS = {"instance", "job"}  # which Prometheus adds
OF_CALLERS = {"rate", "key", "scope", "body_size", "slow_body"}  # reasons that the caller can change
Series = dict[str, dict[str, set[str]]]


@pytest.fixture(scope="module")
def live(built_index: Path) -> Series:
    """Labels and their values of every metric that a running service shows after a few requests."""
    found: Series = defaultdict(lambda: defaultdict(set))
    with serving(built_index, redis_url=f"redis://127.0.0.1:{free_port()}", rate_limit="2/minute") as (app, port):
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            statuses = [client.post("/search/text", json={"query": "red"}).status_code for _ in range(3)]
            text = client.get("/metrics").text
        assert statuses == [200, 200, 429]
        declared = {each._name: each._labelnames for each in (app.state.metrics.task_failures,)}  # none has failed
    for family in text_string_to_metric_families(text):
        names = {sample.name for sample in family.samples} or {f"{family.name}_total"}
        for name in names:
            found[name].update({label: set() for label in declared.get(family.name, ())})
        for sample in family.samples:
            for label, value in sample.labels.items():
                found[sample.name][label].add(value)
    found["up"] = defaultdict(set)  # of Prometheus itself
    return found


def nodes(value: Any) -> Iterator[Any]:
    """Yield an expression of PromQL and its parts."""
    yield value
    for name in ("expr", "lhs", "rhs", "args", "vector_selector"):
        part = getattr(value, name, None)
        for each in part if isinstance(part, list) else [part]:
            if each is not None:
                yield from nodes(each)


@pytest.mark.parametrize(("query", "text"), QUERIES.values(), ids=QUERIES)
def test_a_query_asks_for_what_the_service_has(query: str, text: str, live: Series) -> None:
    parser = importlib.import_module("promql_parser")
    query = query.replace("$__rate_interval", "1m").replace("$__range", "1h")
    parts = list(nodes(parser.parse(query)))
    selectors = [each for each in parts if type(each).__name__ == "VectorSelector"]
    assert selectors
    known = set(TARGET_LABELS)
    for selector in selectors:
        assert selector.name in live, f"the service has no metric {selector.name}"
        labels = live[selector.name]
        known |= labels.keys()
        for matcher in selector.matchers.matchers:
            assert matcher.name in labels.keys() | TARGET_LABELS, f"{selector.name} has no label {matcher.name}"
            if matcher.name == "job":
                assert str(matcher.op) == "MatchOp.Re"
                for job in ("dcar", "shop-dcar"):  # of docker-compose.yml, and of the chart's release `shop`
                    assert re.fullmatch(matcher.value, job)
    for each in parts:
        grouped = getattr(getattr(each, "modifier", None), "labels", [])
        assert set(grouped) <= known
        known = set(grouped) | TARGET_LABELS if grouped else known
    named = re.findall(r"\{\{ *(?:\$labels\.)?(\w+) *\}\}", text)
    assert set(named) <= known, "the legend or the message names a label that the query drops"


def test_the_values_of_matchers_are_those_of_the_service(live: Series) -> None:
    assert "queue" in live["dcar_stage_seconds_bucket"]["stage"]
    assert "hit" in live["dcar_cache_lookups_total"]["outcome"]
    routes = live["dcar_request_seconds_bucket"]["route"]
    assert [route for route in routes if re.fullmatch(".*/search/.*", route)] == ["/search/text"]
    source = "".join(path.read_text() for path in (ROOT / "app").rglob("*.py"))
    reasons = set(re.findall(r'(?:refused=|refused\.labels\()"(\w+)"', source))
    rules = {rule["alert"]: rule["expr"] for rule in RULES}
    alerted = re.search('reason=~"(.*?)"', rules["DcarRefusing"])[1].split("|")  # type: ignore[index]
    assert set(alerted) == reasons - OF_CALLERS - {"vector_store"}, "overload, which more replicas would bear"
    assert reasons >= OF_CALLERS
    assert '+ sum(rate(dcar_refused_total{reason="event_loop"}' in rules["DcarRefusing"], "no request is counted there"
    assert "event_loop" in live["dcar_refused_total"]["reason"], "from the start, or the sum would be empty"
    assert 'reason="vector_store"' in rules["DcarVectorStore"]
    documented = (ROOT / "docs/how-to/monitor.md").read_text().partition("`dcar_refused_total{reason}`: ")[2]
    assert set(documented.partition("\n")[0].split(", ")) == reasons


def test_prometheus_and_grafana_find_their_files() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services = {name: each for name, each in compose["services"].items() if each.get("profiles") == ["monitoring"]}
    assert services.keys() == {"prometheus", "grafana"}
    mounted = {}
    for service in services.values():
        for source, target in (volume.split(":")[:2] for volume in service["volumes"]):
            assert (ROOT / source).is_file() if source.startswith("./") else source in compose["volumes"]
            mounted[target] = source
    prometheus = yaml.safe_load((ROOT / "monitoring" / "prometheus.yml").read_text())
    (scrape,) = prometheus["scrape_configs"]
    (targets,) = scrape["dns_sd_configs"]
    assert targets["port"] == Settings.model_fields["port"].default
    commands = {name: str(each.get("command")) for name, each in compose["services"].items()}
    assert set(targets["names"]) == {name for name, command in commands.items() if "dcar serve" in command}
    assert mounted["/rules/alerts.yaml"] == "./charts/dcar/alerts.yaml"
    (source,) = yaml.safe_load((ROOT / "monitoring" / "grafana.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}
    (provider,) = yaml.safe_load((ROOT / "monitoring" / "dashboards.yaml").read_text())["providers"]
    assert mounted[f"{provider['options']['path']}/dashboard.json"] == "./monitoring/dashboard.json"
