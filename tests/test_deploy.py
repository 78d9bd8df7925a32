"""What is shipped for operators: it parses, and its flags, paths, ports and metrics are those of the server."""

import configparser
import json
import re
import shlex
import tomllib
from pathlib import Path

import httpx
import pytest
import typer
import yaml
from adapter_files import write_adapter
from conftest import TALKING
from live import live_server, make_engine
from prometheus_client.parser import text_string_to_metric_families

from sparsex_jax.cli import app
from sparsex_jax.cli.values import parse_disk_store
from sparsex_jax.config.membership import SECRET, Membership

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "configs" / "deploy"
TARGET_LABELS = {"job", "instance"}  # that Prometheus adds


def serve():
    return typer.main.get_command(app).commands["serve"]


def parsed(arguments):
    """What the command line makes of the arguments. It raises where a flag or a value is wrong."""
    assert arguments[0] == "serve"
    return serve().make_context("serve", list(arguments[1:])).params


def check_flags(text):
    """Each flag in a text is one of `sparsex serve`, also in its comments."""
    known = {name for each in serve().params for name in (*each.opts, *each.secondary_opts)}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known


# Grafana ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    """The labels of each series that a server with tiers and an adapter gives, and the values of each label."""
    engine, series = make_engine(host_store_bytes=1 << 22, max_adapters=1), {}
    engine.load_adapter("sql", write_adapter(tmp_path_factory.mktemp("adapter"), TALKING))
    with live_server(engine) as live:
        text = httpx.get(f"{live.url}/metrics").text
    engine.close()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for label, value in sample.labels.items():
                series.setdefault(sample.name, {}).setdefault(label, set()).add(value)
            series.setdefault(sample.name, {})
    return series


def board():
    return json.loads((DEPLOY / "grafana" / "sparsex.json").read_text())


def targets():
    return [(panel["title"], each) for panel in board()["panels"] for each in panel.get("targets", [])]


def test_the_board_asks_for_metrics_that_there_are(metrics):
    for title, target in targets():
        expression = target["expr"]
        used = re.findall(r"(sparsex_\w+)\{([^}]*)\}", expression)
        assert len(used) == expression.count("sparsex_"), title
        for name, selectors in used:
            assert name in metrics, (title, name)
            for label, sign, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', selectors):
                assert label in TARGET_LABELS | metrics[name].keys(), (title, name, label)
                assert sign in ("=~", "!~") or value in metrics[name][label], (title, value)
        labels = set.intersection(*({*metrics[name]} for name, _ in used)) | TARGET_LABELS
        by = [label.strip() for found in re.findall(r"by \(([^)]*)\)", expression) for label in found.split(",")]
        assert {*by} <= labels | set.union(*({*metrics[name]} for name, _ in used)), title
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert shown <= ({*by} if by or expression.startswith("sum(") else labels), title


def test_the_board_shows_all_metrics(metrics):
    names = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in metrics}
    text = json.dumps(board())
    assert not [name for name in names if name not in text]


def test_the_panels_do_not_overlap():
    cells, ids = set(), [panel["id"] for panel in board()["panels"]]
    assert len(ids) == len(set(ids))
    for panel in board()["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not own & cells, panel["title"]
        cells |= own


# Docker -----------------------------------------------------------------------------------------------------


def instructions():
    """Of the Dockerfile: the instruction, and what follows it."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_the_images_are_made_of_what_there_is():
    found = instructions()
    stages = [re.search(r"AS ([\w-]+)", rest)[1] for word, rest in found if word == "FROM"]
    assert {"cpu", "cuda"} <= {*stages}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"--extra (\w+)", " ".join(rest for _, rest in found)):
        assert extra in project["optional-dependencies"]
    allowed = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    for word, rest in found:
        if word == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()
                assert source.removeprefix("./") in allowed
        if word == "COPY" and rest.startswith("--from"):
            assert re.match(r"--from=([\w-]+)", rest)[1] in stages


def test_the_image_serves_and_is_checked_at_one_port():
    found = dict(instructions())
    assert json.loads(found["ENTRYPOINT"]) == ["sparsex"]
    served = parsed(json.loads(found["CMD"]))
    assert (served["host"], str(served["port"])) == ("0.0.0.0", found["EXPOSE"])
    url = re.search(r"http://127.0.0.1:(\d+)([/\w]+)", found["HEALTHCHECK"])
    assert (url[1], url[2]) == (found["EXPOSE"], "/health/live")
    assert found["USER"].split(":")[0] != "0"
    check_flags((DEPLOY / "Dockerfile").read_text().split("sparsex:cuda \\\n", 1)[1].split("\n\n")[0])


# Kubernetes -------------------------------------------------------------------------------------------------


def manifests(folder="kubernetes"):
    """By kind and name."""
    names = yaml.safe_load((DEPLOY / folder / "kustomization.yaml").read_text())["resources"]
    loaded = [each for name in names for each in yaml.safe_load_all((DEPLOY / folder / name).read_text())]
    return {(each["kind"], each["metadata"]["name"]): each for each in loaded}


def deployment():
    pod = manifests()["Deployment", "sparsex"]["spec"]["template"]
    [container] = pod["spec"]["containers"]
    return pod, container


def gibibytes(quantity):
    return int(re.fullmatch(r"(\d+)Gi", quantity)[1])


def test_the_flags_of_the_deployment_are_the_servers():
    pod, container = deployment()
    served = parsed(container["args"])
    assert served["port"] == container["ports"][0]["containerPort"]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(served["port"])
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert sleep + served["drain_timeout"] + 10 <= pod["spec"]["terminationGracePeriodSeconds"]
    check_flags((DEPLOY / "kubernetes" / "deployment.yaml").read_text().split("args:", 1)[1])


def test_the_probes_ask_what_they_are_for():
    _, container = deployment()
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/health/ready", "liveness": "/health/live", "readiness": "/health/ready"}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800
    ports = {port["name"] for port in container["ports"]}
    assert {container[f"{name}Probe"]["httpGet"]["port"] for name in paths} <= ports
    [port] = manifests()["Service", "sparsex"]["spec"]["ports"]
    assert port["targetPort"] in ports


def test_the_volumes_hold_what_the_server_writes():
    pod, container = deployment()
    all_of, claims = manifests(), {each["name"]: each for each in pod["spec"]["volumes"]}
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert {*mounts.values()} == {*claims}
    disk, size = parse_disk_store(parsed(container["args"])["disk_store"])
    [name] = [name for path, name in mounts.items() if disk.startswith(f"{path}/")]
    claim = all_of["PersistentVolumeClaim", claims[name]["persistentVolumeClaim"]["claimName"]]
    assert size < gibibytes(claim["spec"]["resources"]["requests"]["storage"]) << 30
    assert container["securityContext"]["readOnlyRootFilesystem"]
    environment = " ".join(rest for word, rest in instructions() if word == "ENV")
    for variable in ("HOME", "XDG_CACHE_HOME"):
        assert re.search(rf"\b{variable}=(\S+)", environment)[1] in mounts
    assert dict(instructions())["USER"].split(":")[0] == str(pod["spec"]["securityContext"]["runAsUser"])


def test_the_service_finds_the_pods():
    pod, _ = deployment()
    for selector in (
        manifests()["Service", "sparsex"]["spec"]["selector"],
        manifests()["Deployment", "sparsex"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= pod["metadata"]["labels"].items()


# Several machines -------------------------------------------------------------------------------------------


def group():
    """The stateful set, and the environment of its pods."""
    stateful = manifests("kubernetes-group")["StatefulSet", "sparsex-group"]["spec"]
    [container] = stateful["template"]["spec"]["containers"]
    return stateful, container, {each["name"]: each for each in container["env"]}


def test_the_pods_of_a_group_find_each_other():
    stateful, container, environment = group()
    served, ports = parsed(container["args"]), {each["name"]: each["containerPort"] for each in container["ports"]}
    coordinator = environment["SPARSEX_COORDINATOR"]["value"]
    member = Membership.of(coordinator, int(environment["SPARSEX_NUM_PROCESSES"]["value"]), 1)
    assert member.control == (f"sparsex-group-0.{stateful['serviceName']}", ports["group"])
    assert coordinator.endswith(f":{ports['coordinator']}")
    assert member.num_processes == stateful["replicas"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert served["tensor_parallel"] == stateful["replicas"] * gpus
    assert served["port"] == ports["http"]
    assert served["drain_timeout"] + 10 <= stateful["template"]["spec"]["terminationGracePeriodSeconds"]
    headless = manifests("kubernetes-group")["Service", stateful["serviceName"]]["spec"]
    assert (headless["clusterIP"], headless["publishNotReadyAddresses"]) == ("None", True)
    assert {each["port"] for each in headless["ports"]} == {ports["group"], ports["coordinator"]}
    assert stateful["podManagementPolicy"] == "Parallel"


def test_the_pods_of_a_group_have_what_the_commands_read():
    _, _, environment = group()
    serving = {each.envvar for each in serve().params if each.envvar}
    assert {*environment} - {SECRET} == serving
    folder = DEPLOY / "kubernetes-group"
    check_flags((folder / "statefulset.yaml").read_text().split("args:", 1)[1].split("env:")[0])
    selected = manifests("kubernetes-group")["Service", "sparsex"]["spec"]["selector"]
    assert selected == {"statefulset.kubernetes.io/pod-name": "sparsex-group-0"}


def test_the_job_of_slurm_serves_with_all_gpus():
    text = (DEPLOY / "slurm" / "sparsex.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", text, re.MULTILINE))
    command = re.search(r"^srun .* -- +(serve .*)$", text.replace("\\\n", " "), re.MULTILINE)[1]
    served = parsed(shlex.split(command.replace("${MODEL:?a model that all nodes can read}", "MODEL")))
    assert served["tensor_parallel"] == int(asked["nodes"]) * int(asked["gpus-per-node"])
    assert (ROOT / "scripts" / "run_distributed.py").exists()
    assert served["drain_timeout"] < int(asked["signal"].partition("@")[2])
    assert f"export {SECRET}" in text


# systemd ----------------------------------------------------------------------------------------------------


def seconds(span):
    number, unit = re.fullmatch(r"(\d+)(min|s|)", span).groups()
    return int(number) * (60 if unit == "min" else 1)


def test_the_unit_starts_drains_and_watches():
    text = (DEPLOY / "systemd" / "sparsex.service").read_text()
    unit = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#",))
    unit.optionxform = str
    unit.read_string(text.replace("\\\n", " "))
    service = unit["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    served = parsed(arguments)
    assert Path(program).name == "sparsex"
    assert service["Type"] == "notify"
    assert served["drain_timeout"] + 10 <= seconds(service["TimeoutStopSec"])
    assert seconds(service["TimeoutStartSec"]) >= 1800
    assert seconds(service["WatchdogSec"]) >= 10
    assert parse_disk_store(served["disk_store"])[0].startswith(f"/var/lib/{service['StateDirectory']}/")
    assert "MemoryDenyWriteExecute" not in service
    assert (service["NoNewPrivileges"], service["ProtectSystem"]) == ("yes", "strict")
    check_flags(text.split("[Service]", 1)[1])
