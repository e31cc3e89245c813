"""Metrics, request ids, logs, and a shutdown that drops no request; the dashboard and
the alerts.
"""

import importlib
import json
import logging
import re
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from app.core.settings import Settings
from tests.support.images import png
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.responses import scrape
from tests.support.service import (
    ServiceClient,
    before_encoding,
    opened,
    restore,
    serving,
    serving_process,
)

REQUEST_LOG = "app.api.guard"


async def test_metrics_count_stages_cache_lookups_and_requests(
    reranking_index: Path,
) -> None:
    async with opened(reranking_index) as client:
        # embedded, then with a cached embedding, then with cached results
        for k in (3, 4, 4):
            response = await client.post("/search/text", json={"query": "red", "k": k})
            assert response.status_code == 200
        response = await client.post("/search/image", files={"file": png()})
        assert response.status_code == 200
        for i in range(20):
            await client.get(f"/probing/{i}")
        found = await scrape(client)

        def stage(name: str) -> float:
            return found["dcar_stage_seconds_count", (("stage", name),)]

        assert {
            name: stage(name) for name in ("queue", "encode", "decode", "search")
        } == {
            "queue": 2,
            "encode": 2,
            "decode": 1,
            "search": 3,
        }
        assert found["dcar_batch_size_sum", ()] == 2
        assert found["dcar_batch_size_count", ()] == 2
        assert found["dcar_cache_lookups_total", (("outcome", "hit"),)] == 2
        assert found["dcar_index_version", (("collection", "reranking"),)] == 1
        assert found["dcar_index_items", (("collection", "reranking"),)] == 24
        assert found["dcar_index_degraded", (("collection", "reranking"),)] == 0
        assert found["dcar_errors_total", ()] == 0
        assert (
            found[
                "dcar_request_seconds_count",
                (("route", "/search/text"), ("status", "200")),
            ]
            == 3
        )
        assert (
            found["dcar_request_seconds_count", (("route", "none"), ("status", "404"))]
            == 20
        )
        assert not any("probing" in value for _, labels in found for _, value in labels)
        assert found["process_resident_memory_bytes", ()] > 1e6

        encoder = client.app.state.collections[None].current.encoder
        before_encoding(encoder, None)  # type: ignore[arg-type]
        response = await client.post("/search/text", json={"query": "blue"})
        assert response.status_code == 500
        assert (await scrape(client))["dcar_errors_total", ()] == 1
        restore(encoder)


async def test_good_request_id_is_kept_and_logged(
    started: ServiceClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, REQUEST_LOG)
    given = await started.post(
        "/search/text",
        json={"query": "red"},
        headers={"X-Request-ID": "shop-7/a"},
    )
    assert given.headers["x-request-id"] == "shop-7/a"
    made = await started.post("/search/text", json={"query": "a secret wish"})
    refused = [
        await started.get(
            "/items/nothing%0Aat%20all", headers={"X-Request-ID": "a b\tc"}
        )
    ]
    for malformed in ("", "x" * 129, "<script>"):
        refused.append(
            await started.get("/" + "%ff" * 20_000, headers={"X-Request-ID": malformed})
        )
    for response in (made, *refused):
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])

    lines = [
        record.getMessage() for record in caplog.records if record.name == REQUEST_LOG
    ]
    assert len(lines) == 6, "successful probes are not logged"
    assert max(map(len, lines)) < 5000, "long paths are shortened"
    assert lines[0].startswith("POST /search/text 200 in ")
    assert lines[2].startswith("GET /items/nothing%0Aat%20all 404 in ")
    assert "secret wish" not in caplog.text


@pytest.mark.slow
def test_a_shutdown_finishes_requests_and_logs_json(built_index: Path) -> None:
    """After SIGTERM nobody can connect, and an upload is finished."""
    with serving_process(built_index, DCAR_LOG_FORMAT="json") as (process, client, log):

        def slowly() -> Any:
            yield (
                b'--b\r\nContent-Disposition: form-data; name="file";'
                b' filename="x.png"\r\n\r\n' + png()
            )
            # it has read the beginning
            assert httpx.get(client.base_url.join("/healthz")).status_code == 200
            process.send_signal(signal.SIGTERM)
            time.sleep(0.8)
            with pytest.raises(httpx.ConnectError):
                httpx.get(client.base_url.join("/readyz"))
            yield b"\r\n--b--\r\n"

        kind = {
            "Content-Type": "multipart/form-data; boundary=b",
            "X-Request-ID": "the-last",
        }
        assert (
            client.post("/search/image", content=slowly(), headers=kind).status_code
            == 200
        )
    assert process.returncode in (0, -signal.SIGTERM)
    lines = [json.loads(line) for line in log]
    assert all(
        {"time", "level", "logger", "message", "request_id"} <= line.keys()
        for line in lines
    )
    last = next(
        line
        for line in lines
        if line["request_id"] == "the-last" and line["logger"] == REQUEST_LOG
    )
    assert last["path"] == "/search/image"
    assert last["status"] == 200
    assert last["method"] == "POST"
    assert last["ms"] > 500


DASHBOARD = json.loads((ROOT / "monitoring" / "dashboard.json").read_text())
ALERTS = yaml.safe_load((ROOT / "charts" / "dcar" / "alerts.yaml").read_text())
TARGETS = [
    (panel["title"], each) for panel in DASHBOARD["panels"] for each in panel["targets"]
]
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
QUERIES = {
    **{
        f"{title} {target['refId']}": (target["expr"], target["legendFormat"])
        for title, target in TARGETS
    },
    **{rule["alert"]: (rule["expr"], rule["annotations"]["summary"]) for rule in RULES},
}
TARGET_LABELS = {"instance", "job"}  # which Prometheus adds
# reasons that the caller can change
OF_CALLERS = {"rate", "key", "scope", "body_size", "slow_body"}
Series = dict[str, dict[str, set[str]]]


@pytest.fixture(scope="module")
def live(built_index: Path, tmp_path_factory: pytest.TempPathFactory) -> Series:
    """Labels and their values of every metric that a running service shows after a few
    requests.
    """
    found: Series = defaultdict(lambda: defaultdict(set))
    feedback = tmp_path_factory.mktemp("feedback")
    with serving(built_index, rate_limit="2/minute", feedback=feedback) as (app, port):
        for counter in (app.state.metrics.task_failures, app.state.feedback.lost):
            counter.labels("none yet")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            statuses = [
                client.post("/search/text", json={"query": "red"}).status_code
                for _ in range(3)
            ]
            text = client.get("/metrics").text
        assert statuses == [200, 200, 429]
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found[sample.name]  # also of a metric without labels
            for label, value in sample.labels.items():
                labels[label].add(value)
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


@needs("promql")
@pytest.mark.parametrize(
    ("query", "text"),
    QUERIES.values(),
    ids=QUERIES,
)
def test_a_query_asks_for_what_the_service_has(
    query: str,
    text: str,
    live: Series,
) -> None:
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
            assert matcher.name in labels.keys() | TARGET_LABELS, (
                f"{selector.name} has no label {matcher.name}"
            )
            if matcher.name == "job":
                assert str(matcher.op) == "MatchOp.Re"
                # of docker-compose.yml, and of the chart's release `shop`
                for job in ("dcar", "shop-dcar"):
                    assert re.fullmatch(matcher.value, job)
    for part in parts:
        grouped = getattr(getattr(part, "modifier", None), "labels", [])
        assert set(grouped) <= known
        known = set(grouped) | TARGET_LABELS if grouped else known
    named = re.findall(r"\{\{ *(?:\$labels\.)?(\w+) *\}\}", text)
    assert set(named) <= known, (
        "the legend or the message names a label that the query drops"
    )


def test_the_values_of_matchers_are_those_of_the_service(live: Series) -> None:
    assert "queue" in live["dcar_stage_seconds_bucket"]["stage"]
    assert "hit" in live["dcar_cache_lookups_total"]["outcome"]
    routes = live["dcar_request_seconds_bucket"]["route"]
    assert [route for route in routes if re.fullmatch(".*/search/.*", route)] == [
        "/search/text"
    ]
    source = "".join(path.read_text() for path in (ROOT / "app").rglob("*.py"))
    reasons = set(re.findall(r'(?:refused=|refused\.labels\()"(\w+)"', source))
    rules = {rule["alert"]: rule["expr"] for rule in RULES}
    alerted = re.search('reason=~"(.*?)"', rules["DcarRefusing"])[1].split("|")  # type: ignore[index]
    assert set(alerted) == reasons - OF_CALLERS - {"vector_store"}, (
        "overload, which more replicas would bear"
    )
    assert reasons >= OF_CALLERS
    assert 'reason="vector_store"' in rules["DcarVectorStore"]
    documented = (
        (ROOT / "docs/how-to/monitor.md")
        .read_text()
        .partition("`dcar_refused_total{reason}`: ")[2]
    )
    assert set(documented.partition("\n- ")[0].replace(",", " ").split()) == reasons


REQUESTS = 'dcar_request_seconds_count{job="dcar",instance="%s",route="%s",status="%d"}'
VALUE = '%s{job="dcar",instance="%s",collection="index"}'
UP = {
    'up{job="dcar",instance="a"}': "1x200",
    VALUE % ("dcar_index_version", "a"): "1x200",
}
START = 'process_start_time_seconds{job="dcar",instance="a"}'
QUIET = {
    REQUESTS % ("a", "/search/text", 200): "50x200",
    REQUESTS % ("a", "/readyz", 200): "0+6x200",
}
TASK = 'dcar_task_failures_total{job="dcar",instance="a",task="writer"}'
# two samples a minute, from a service that is up
CASES: dict[str, tuple[dict[str, str], set[str]]] = {
    "a service without requests": (QUIET, set()),
    "no service": (dict.fromkeys(UP, "1x10 stale"), {"DcarDown"}),
    "a restart with new counters": (
        QUIET | {START: "5x100 9x100", TASK: "3x99 0x99"},
        set(),
    ),
    "restarts without end": ({START: "1x150 2x10 3x10 4x10 5x10"}, {"DcarRestarts"}),
    "a model that is stuck": (
        {REQUESTS % ("a", "/readyz", 503): "0x100 0+6x100"},
        {"DcarNotReady"},
    ),
    "one worker of two degraded": (
        {VALUE % ("dcar_index_degraded", "a"): "0x100 " + "1 0 " * 50},
        {"DcarDegraded"},
    ),
    "a replica that stays behind": (
        {VALUE % ("dcar_index_version", "b"): "0x200"},
        {"DcarVersions"},
    ),
    "one failure": (
        {**QUIET, REQUESTS % ("a", "/search/text", 503): "0x180 1x20"},
        set(),
    ),
    "failures": (
        {
            REQUESTS % ("a", "/search/text", 200): "0+90x200",
            REQUESTS % ("a", "/search/text", 503): "0+6x200",
        },
        {"DcarFailing"},
    ),
    "writes that wait for a disk": ({TASK: "0x180 0+6x20"}, {"DcarTasks"}),
}


@needs("promtool")
def test_alerts_fire_when_they_should_and_not_else(tmp_path: Path) -> None:
    def case(name: str, series: dict[str, str], fired: set[str]) -> dict[str, Any]:
        expected = [
            {"labels": f'{{alertname="{each}"}}', "value": 1} for each in sorted(fired)
        ]
        query = 'count by (alertname) (ALERTS{alertstate="firing"})'
        return {
            "name": name,
            "interval": "30s",
            "input_series": [
                {"series": each, "values": values}
                for each, values in (UP | series).items()
            ],
            "promql_expr_test": [
                {"expr": query, "eval_time": "100m", "exp_samples": expected}
            ],
        }

    tests = [case(name, *each) for name, each in CASES.items()]
    rules = {
        "rule_files": [str(ROOT / "charts/dcar/alerts.yaml")],
        "evaluation_interval": "30s",
        "tests": tests,
    }
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(rules))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "tests.yaml"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_finds_its_files() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services = {
        name: each
        for name, each in compose["services"].items()
        if each.get("profiles") == ["monitoring"]
    }
    assert services.keys() == {"prometheus", "grafana"}
    mounted = {}
    for service in services.values():
        for source, target in (volume.split(":")[:2] for volume in service["volumes"]):
            assert (
                (ROOT / source).is_file()
                if source.startswith("./")
                else source in compose["volumes"]
            )
            mounted[target] = source
    prometheus = yaml.safe_load((ROOT / "monitoring" / "prometheus.yml").read_text())
    (scrape,) = prometheus["scrape_configs"]
    (targets,) = scrape["dns_sd_configs"]
    assert targets["port"] == Settings.model_fields["port"].default
    commands = {
        name: str(each.get("command")) for name, each in compose["services"].items()
    }
    assert set(targets["names"]) == {
        name for name, command in commands.items() if "dcar serve" in command
    }
    assert mounted["/rules/alerts.yaml"] == "./charts/dcar/alerts.yaml"
