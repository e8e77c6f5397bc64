"""The files for Ollama, vLLM, Kubernetes and Compose: held against the schemas of those who read them, and against our rules.

None of them can be run here, so what a schema cannot see is checked too: that a pod cannot write, call out or become root,
and that each file asks the model what the model was taught.
"""

import copy
import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml

from slmops_course.models import CHATML
from slmops_course.tasks import load_task

DEPLOY = Path(__file__).parent.parent / "deploy"
OURS = [path for name in ("ollama", "vllm", "kubernetes", "compose") for path in sorted((DEPLOY / name).iterdir())]
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
KUBERNETES = "1.34"


def documents():
    """Every Kubernetes object, with its file's name."""
    return [(path.name, document) for path in MANIFESTS for document in yaml.safe_load_all(path.read_text("utf-8"))]


def one(kind, name=None):
    found = [d for _, d in documents() if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} of {kind} {name or ''}"
    return found[0]


def image_problem(image):
    """Say why an image's version may change by itself, or None."""
    name, _, tag = image.rpartition(":")
    return None if name and re.search(r"\d+\.\d+", tag) else f"{image} has no version"


# --- Kubernetes ---


def validate(document):
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="`pip install kubernetes-validate` brings schemas")
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize(("file", "document"), documents(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_object_is_as_kubernetes_has_it(file, document):
    validate(document)


def test_the_schemas_do_say_no():
    deployment = one("Deployment")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    container["readinessProbes"] = container.pop("readinessProbe")
    with pytest.raises(Exception, match="readinessProbes"):
        validate(deployment)


def pod_problems(deployment):
    """What a pod of this deployment could do that it must not, and what it lacks."""
    pod = deployment["spec"]["template"]["spec"]
    problems = [] if pod.get("automountServiceAccountToken") is False else ["it gets a key to the cluster"]
    if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")) or any("hostPath" in v for v in pod["volumes"]):
        problems.append("it reaches into its node")
    for container in pod["containers"]:
        # What the container says goes before what its pod says.
        context = pod.get("securityContext", {}) | container.get("securityContext", {})
        limits, requests = (container.get("resources", {}).get(name, {}) for name in ("limits", "requests"))
        probes = [container.get(f"{name}Probe", {}).get("httpGet") for name in ("startup", "readiness", "liveness")]
        fixed = [mount for mount in container["volumeMounts"] if mount["name"] in ("model", "config")]
        secrets = [e["name"] for e in container.get("env", []) if re.search("TOKEN|KEY|SECRET|PASSWORD", e["name"])]
        rules = {
            "it may run as root": context.get("runAsNonRoot") is True and context.get("runAsUser", 0) > 0,
            "it can write to its image": context.get("readOnlyRootFilesystem") is True,
            "it can gain rights": context.get("allowPrivilegeEscalation") is False and not context.get("privileged"),
            "it keeps capabilities": context.get("capabilities") == {"drop": ["ALL"]},
            "it may make any system call": context.get("seccompProfile", {}).get("type") == "RuntimeDefault",
            "its share of the node is open": all(name in limits and name in requests for name in ("cpu", "memory")),
            "nobody asks how it is": all(probe == {"path": "/health", "port": "http"} for probe in probes),
            "it can change the model": all(mount.get("readOnly") for mount in fixed),
            "it holds a secret": not secrets and "envFrom" not in container,
            str(image_problem(container["image"])): image_problem(container["image"]) is None,
        }
        problems += [problem for problem, kept in rules.items() if not kept]
    return problems


def test_a_pod_can_do_no_more_than_it_must():
    assert pod_problems(one("Deployment")) == []
    labels = one("Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def first(deployment):
    return deployment["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (lambda d: d["spec"]["template"]["spec"].pop("automountServiceAccountToken"), "it gets a key to the cluster"),
        (lambda d: d["spec"]["template"]["spec"].update(hostNetwork=True), "it reaches into its node"),
        (lambda d: d["spec"]["template"]["spec"]["volumes"].append({"hostPath": {"path": "/"}}), "it reaches into its node"),
        (lambda d: first(d)["securityContext"].update(runAsNonRoot=False), "it may run as root"),
        (lambda d: first(d)["securityContext"].update(runAsUser=0), "it may run as root"),
        (lambda d: first(d)["securityContext"].pop("readOnlyRootFilesystem"), "it can write to its image"),
        (lambda d: first(d)["securityContext"].pop("allowPrivilegeEscalation"), "it can gain rights"),
        (lambda d: first(d)["securityContext"]["capabilities"].update(add=["NET_ADMIN"]), "it keeps capabilities"),
        (lambda d: d["spec"]["template"]["spec"]["securityContext"].pop("seccompProfile"), "it may make any system call"),
        (lambda d: first(d)["resources"]["limits"].pop("memory"), "its share of the node is open"),
        (lambda d: first(d).pop("livenessProbe"), "nobody asks how it is"),
        (lambda d: first(d)["volumeMounts"][0].pop("readOnly"), "it can change the model"),
        (lambda d: first(d)["env"].append({"name": "HF_TOKEN", "value": "x"}), "it holds a secret"),
        (lambda d: first(d).update(image="vllm/vllm-openai:latest"), "vllm/vllm-openai:latest has no version"),
    ],
)
def test_a_pod_that_can_do_more_is_found(break_it, problem):
    deployment = copy.deepcopy(one("Deployment"))
    break_it(deployment)
    assert pod_problems(deployment) == [problem]


def test_nothing_goes_out_and_only_named_clients_come_in():
    closed, opened = one("NetworkPolicy", "deny-all")["spec"], one("NetworkPolicy", "allow-clients")["spec"]
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}, "an empty list of rules lets nothing through"
    assert opened["policyTypes"] == ["Ingress"]
    assert "egress" not in opened
    (rule,) = opened["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": first(one("Deployment"))["ports"][0]["containerPort"]}]
    assert rule["from"], "no peer named is every peer"
    for peer in rule["from"]:
        assert set(peer) <= {"podSelector", "namespaceSelector"}
        assert all(selector.get("matchLabels") for selector in peer.values()), "an empty selector is everybody"


def test_the_objects_mean_one_another():
    deployment = one("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        one("Service")["spec"]["selector"],
        one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one("NetworkPolicy", "allow-clients")["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector == labels for selector in selectors)
    scaled = one("HorizontalPodAutoscaler")["spec"]
    assert scaled["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"], "kind": "Deployment", "name": deployment["metadata"]["name"],
    }  # fmt: skip
    assert "replicas" not in deployment["spec"], "each `kubectl apply` would undo what the autoscaler did"
    assert one("PodDisruptionBudget")["spec"]["minAvailable"] < scaled["minReplicas"] < scaled["maxReplicas"]
    assert one("Service")["spec"]["ports"][0]["targetPort"] == first(deployment)["ports"][0]["name"]
    volumes = {v["name"]: v for v in deployment["spec"]["template"]["spec"]["volumes"]}
    assert {m["name"] for m in first(deployment)["volumeMounts"]} == set(volumes)
    assert volumes["model"]["persistentVolumeClaim"]["claimName"] == one("PersistentVolumeClaim")["metadata"]["name"]
    assert volumes["config"]["configMap"]["name"] == one("ConfigMap")["metadata"]["name"]
    namespaces = {d["metadata"]["namespace"] for _, d in documents() if d["kind"] != "Namespace"}
    assert namespaces == {one("Namespace")["metadata"]["name"]}


# --- vLLM ---


def test_vllm_serves_the_same_everywhere():
    config = yaml.safe_load((DEPLOY / "vllm" / "config.yaml").read_text("utf-8"))
    assert yaml.safe_load(one("ConfigMap")["data"]["config.yaml"]) == config
    container = first(one("Deployment"))
    assert config["port"] == container["ports"][0]["containerPort"]
    assert config["model"] in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert json.loads(config["override-generation-config"]) == {"temperature": 0}
    assert not {"trust-remote-code", "api-key"} & set(config)
    service = compose()["services"]["vllm"]
    assert (service["image"], service["command"]) == (container["image"], container["args"])
    assert service["environment"] == {variable["name"]: variable["value"] for variable in container["env"]}


# --- Compose ---


def compose():
    return yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text("utf-8"))


def check_compose(document):
    schemas = pytest.importorskip("check_jsonschema.builtin_schemas", reason="`pip install check-jsonschema` brings the schema")
    jsonschema.validate(document, schemas.get_builtin_schema("vendor.compose-spec"))


def test_compose_is_as_its_specification_has_it():
    check_compose(compose())
    broken = compose()
    broken["services"]["vllm"]["heathcheck"] = broken["services"]["vllm"].pop("healthcheck")
    with pytest.raises(jsonschema.ValidationError, match="heathcheck"):
        check_compose(broken)


def test_a_container_can_do_no_more_than_it_must():
    for name, service in compose()["services"].items():
        kept = {key: service[key] for key in ("read_only", "cap_drop", "security_opt", "user")}
        assert kept == {
            "read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"], "user": "2000:2000",
        }, name  # fmt: skip
        assert "mem_limit" in service, name
        assert image_problem(service["image"]) is None
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), "it listens to the whole network"
        assert all(v.get("read_only") for v in service["volumes"] if isinstance(v, dict)), name
        assert "healthcheck" in service or service["restart"] == "no", name


# --- Ollama ---

WORDS = {
    "num_ctx": int, "num_predict": int, "repeat_last_n": int, "repeat_penalty": float, "seed": int, "stop": str,
    "temperature": float, "top_k": int, "top_p": float, "min_p": float,
}  # fmt: skip


def read_modelfile(text):
    """The instructions of a Modelfile as `(instruction, argument)`; ValueError for what Ollama would not take.

    https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
    """
    found, position = [], 0
    line = re.compile(
        r'\s*(?:#[^\n]*|(?P<name>\w+)[ \t]+(?:"""(?P<long>.*?)"""|(?P<short>(?!""")[^\n]*[^\s]))[ \t]*)(?:\n|\Z)', re.DOTALL
    )
    while text[position:].strip():
        match = line.match(text, position)
        if match is None:
            raise ValueError(f"no instruction: {text[position:].strip()[:40]!r}")
        if match["name"]:
            found.append((match["name"].upper(), match["short"] if match["long"] is None else match["long"]))
        position = match.end()
    for name, argument in found:
        if name not in ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE", "REQUIRES"):
            raise ValueError(f"no such instruction: {name}")
        if name == "PARAMETER":
            word, value = shlex.split(argument)
            WORDS.get(word, "".index)(value)  # ValueError for an unknown word and for a wrong value alike
    if [name for name, _ in found].count("FROM") != 1:
        raise ValueError("a Modelfile has one FROM")
    return found


def test_the_modelfile_is_as_ollama_has_it():
    found = read_modelfile((DEPLOY / "ollama" / "Modelfile").read_text("utf-8"))
    assert ("FROM", "./student-Q4_0.gguf") in found
    assert ("SYSTEM", load_task().prompt) in found
    parameters = dict(shlex.split(argument) for name, argument in found if name == "PARAMETER")
    assert parameters == {"temperature": "0", "num_ctx": "2048", "num_predict": "48", "stop": "<|im_end|>"}


@pytest.mark.parametrize(
    "text",
    ["", "TEMPLATE x", "FROM a\nFROM b", "FROM a\nPARAMETER temprature 0", "FROM a\nPARAMETER num_ctx many", "FROM a\nENV b",
     "FROM a\njust words", "FROM a\nPARAMETER stop", 'FROM a\nSYSTEM """open'],
)  # fmt: skip
def test_a_modelfile_that_ollama_would_refuse_is_found(text):
    with pytest.raises(ValueError, match=r"."):
        read_modelfile(text)


def test_ollama_writes_a_conversation_as_the_model_was_taught():
    """The Go template, put into Jinja word by word, gives what the tokenizer's template gives."""
    import jinja2

    go = dict(read_modelfile((DEPLOY / "ollama" / "Modelfile").read_text("utf-8")))["TEMPLATE"]
    words = {
        "range .Messages": "{% for message in messages %}", ".Role": "{{ message.role }}",
        ".Content": "{{ message.content }}", "end": "{% endfor %}",
    }  # fmt: skip
    jinja = re.sub(r"{{ (.*?) }}", lambda match: words[match[1]], go)
    environment = jinja2.Environment(keep_trailing_newline=True)
    conversation = load_task().messages("I lost\nmy card")
    expected = environment.from_string(CHATML).render(messages=conversation, add_generation_prompt=True)
    assert environment.from_string(jinja).render(messages=conversation) == expected


# --- All of them ---


@pytest.mark.parametrize("path", OURS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_file_says_that_it_was_not_run_and_holds_no_secret(path):
    text = path.read_text("utf-8")
    if path.parent.name != "kubernetes" or path.name == "deployment.yaml":
        assert "not run" in text
    assert not re.search(r"(hf_|sk-)[A-Za-z0-9]{8}|BEGIN [A-Z ]*PRIVATE KEY", text)
    assert not re.search(r"kind: Secret|/root/|/home/", text)
    assert max(map(len, text.splitlines())) <= 128
