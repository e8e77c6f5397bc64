"""The clients are run as a person runs them, against services over HTTP on loopback: one that misbehaves, and Foundry Local.

Importing the openai library takes a second, so the Python client is called in this process; once it is run as a program.
The C# client is built by the .NET SDK where there is one. Else Mono's compiler builds it, and the .NET runtime out of a
wheel runs it.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from slmops_course.models import ModelError, Wheel, fetch_wheel
from slmops_course.rehearsal import RehearsalEndpoint, body, completion, cut, status
from slmops_course.serving import FoundryLocal
from slmops_course.tasks import load_task

CLIENTS = Path(__file__).parent.parent / "clients"
RUNTIME = Wheel(
    requirement="dotnetcore2==3.1.23",
    filename="dotnetcore2-3.1.23-py3-none-manylinux1_x86_64.whl",
    sha256="5f076ddc39da0c685e7de20ecb91ee81185928918ec86fbeb3bffc55dd867ab5",
    member="",
    member_sha256="",
)
# The .NET runtime looks for a library of its own for languages, unless told that none is needed.
QUIET = {"DOTNET_SYSTEM_GLOBALIZATION_INVARIANT": "1", "DOTNET_CLI_TELEMETRY_OPTOUT": "1", "PYTHONUTF8": "1"}
NO_NODE = "Node.js is not on this machine: `apt-get install nodejs` brings it."
ANSWER = '{"intent":"card_lost","words":"कार्ड 😀"}'


PYTHON = CLIENTS / "python" / "ask.py"


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """How each client is called; what cannot be called here is the sentence why."""
    node = shutil.which("node")
    return {
        "python": call_python,
        "node": [node, str(CLIENTS / "node" / "ask.mjs")] if node else NO_NODE,
        "csharp": build_csharp(tmp_path_factory.mktemp("csharp")),
    }


def call_python(arguments, environment):
    """Calls the Python client's `main`; returns its exit code, its output and its complaints."""
    spec = importlib.util.spec_from_file_location("ask", PYTHON)
    ask = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ask)
    code = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.delenv("OPENAI_API_KEY", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        with contextlib.redirect_stderr(io.StringIO()) as complaints:
            try:
                ask.main(list(arguments))
            except SystemExit as end:  # a text is what Python would print before it ends with code 1
                code = end.code if isinstance(end.code, int) else 1
                complaints.write(str(end.code) if code == 1 else "")
    return code, printed.getvalue(), complaints.getvalue().strip()


def build_csharp(folder):
    if shutil.which("dotnet"):
        shutil.copytree(CLIENTS / "csharp", folder / "source")
        build = ["dotnet", "build", "--nologo", "--output", str(folder / "out"), str(folder / "source" / "Ask.csproj")]
        done = subprocess.run(build, capture_output=True, text=True, env=os.environ | QUIET)
        assert done.returncode == 0, done.stdout + done.stderr
        return ["dotnet", str(folder / "out" / "Ask.dll")]
    if not shutil.which("mcs") or sys.platform != "linux":
        return "Neither the .NET SDK nor Mono's compiler is on this machine: `apt-get install mono-mcs` brings the latter."
    try:
        with zipfile.ZipFile(fetch_wheel(RUNTIME, folder)) as wheel:
            wheel.extractall(folder)
    except ModelError as error:
        return f"The .NET runtime comes from the package index: {error}"
    program = folder / "dotnetcore2" / "bin" / "dotnet"
    program.chmod(0o755)
    libraries = [
        path
        for pattern in ("System*.dll", "mscorlib.dll", "netstandard.dll")
        for path in program.parent.glob(f"shared/Microsoft.NETCore.App/*/{pattern}")
        if "Native" not in path.name and "WindowsRuntime" not in path.name
    ]
    references = [f"-r:{path}" for path in libraries]
    build = ["mcs", "-langversion:latest", "-nostdlib", "-noconfig", f"-out:{folder / 'Ask.dll'}", *references]
    done = subprocess.run([*build, str(CLIENTS / "csharp" / "Ask.cs")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    framework = {"name": "Microsoft.NETCore.App", "version": "3.1.0"}
    (folder / "Ask.runtimeconfig.json").write_text(json.dumps({"runtimeOptions": {"framework": framework}}), "utf-8")
    return [str(program), str(folder / "Ask.dll")]


def run_program(command, arguments, environment):
    """Runs a command; returns its exit code, its output and its complaints."""
    env = {k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"} | QUIET | environment
    done = subprocess.run([*command, *arguments], capture_output=True, encoding="utf-8", env=env, timeout=60)
    return done.returncode, done.stdout, done.stderr.strip()


@pytest.fixture(params=["python", "node", "csharp"])
def run(request, commands):
    """Runs a client with some arguments and environment variables."""
    command = commands[request.param]
    if isinstance(command, str):
        pytest.skip(command)
    if callable(command):
        return lambda *arguments, **environment: command(arguments, environment)
    return lambda *arguments, **environment: run_program(command, arguments, environment)


def stream_of(*pieces, end=True):
    """A step that sends pieces as server-sent events, in packets that end anywhere, within a letter too."""

    def send(handler, request):
        deltas = [{"role": "assistant"}, *({"content": piece} for piece in pieces), {}]
        chunks = [{"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"} for _ in deltas]
        for chunk, delta in zip(chunks, deltas, strict=True):
            chunk["choices"] = [{"index": 0, "delta": delta, "finish_reason": None}]
        chunks.append(chunks[0] | {"choices": []})  # the one that carries the usage has no choice
        events = "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n" for chunk in chunks)
        data = (": a comment\n\n" + events + "data: [DONE]\n\n" * end).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        for start in range(0, len(data), 7):
            handler.wfile.write(data[start : start + 7])
            handler.wfile.flush()

    return send


def test_it_prints_the_answer(run):
    with RehearsalEndpoint(lambda text: ANSWER) as endpoint:
        assert run(endpoint.url, "support-desk", "I lost my card, मेरा कार्ड") == (0, ANSWER + "\n", "")
        assert run(endpoint.url + "/", "support-desk", "again", "--system", "Be brief.")[0] == 0
    first, second = endpoint.requests
    assert first["model"] == "support-desk"
    asked = [(m["role"], m["content"]) for m in first["messages"]]
    assert asked == [("system", load_task().prompt), ("user", "I lost my card, मेरा कार्ड")], "not what the model was taught"
    assert (first["temperature"], first["max_tokens"], first.get("stream", False)) == (0, 256, False)
    assert second["messages"][0]["content"] == "Be brief."


def test_the_python_client_is_a_program():
    with RehearsalEndpoint(lambda text: ANSWER) as endpoint:
        assert run_program([sys.executable, str(PYTHON)], [endpoint.url, "m", "hello"], {}) == (0, ANSWER + "\n", "")
    assert run_program([sys.executable, str(PYTHON)], [endpoint.url], {})[0] == 2


def test_a_stream_is_printed_piece_by_piece(run):
    with RehearsalEndpoint(str, stream_of(ANSWER[:9], ANSWER[9:33], ANSWER[33:]), stream_of(ANSWER, end=False)) as endpoint:
        assert run(endpoint.url, "m", "hello", "--stream") == (0, ANSWER + "\n", "")
        assert run(endpoint.url, "m", "hello", "--stream") == (0, ANSWER + "\n", "")
    assert endpoint.requests[0]["stream"] is True


def test_a_key_is_sent_where_there_is_one(run):
    with RehearsalEndpoint(lambda text: ANSWER) as endpoint:
        run(endpoint.url, "m", "hello")
        run(endpoint.url, "m", "hello", OPENAI_API_KEY="a-key")
    assert endpoint.keys == ["Bearer none-needed", "Bearer a-key"]


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_what_is_wrong_is_one_sentence(run, stream):
    unknown = status(404, '{"error": {"message": "no model of that name"}}')
    with RehearsalEndpoint(lambda text: "Sure! Here is", unknown, status(500, "<html>oops")) as endpoint:
        code, printed, complaint = run(endpoint.url, "m", "hello", *stream)
        assert (code, printed) == (1, "")
        assert "HTTP status 404" in complaint
        assert "no model of that name" in complaint
        assert complaint.endswith("check that it has the model m.")
        assert "HTTP status 500" in run(endpoint.url, "m", "hello", *stream)[2]
    code, printed, complaint = run(endpoint.url, "m", "hello", *stream)
    assert (code, printed) == (1, "")
    assert complaint.startswith(f"Nothing answers at {endpoint.url} (")
    assert complaint.count("\n") == 0


def test_an_answer_that_is_none_is_one_sentence(run):
    steps = body(completion("Sure! Here is")), body("<html>sign in</html>", "text/html"), cut, body('{"choices": []}')
    with RehearsalEndpoint(str, *steps) as endpoint:
        for _ in steps:
            code, printed, complaint = run(endpoint.url, "m", "hello")
            assert (code, printed) == (1, "")
            assert complaint
            assert "\n" not in complaint


def test_an_address_that_is_none_is_one_sentence(run):
    code, printed, complaint = run("not-an-address", "m", "hello")
    assert (code, printed, complaint.count("\n")) == (1, "", 0)
    assert complaint.startswith("Nothing answers at not-an-address")


def test_missing_arguments_are_said(run):
    code, printed, complaint = run("http://127.0.0.1:9/v1")
    assert (code != 0, printed) == (True, "")
    assert "usage:" in complaint.lower()


@pytest.fixture(scope="module")
def foundry(tiny_onnx_folder, tmp_path_factory):
    with FoundryLocal(tmp_path_factory.mktemp("foundry")) as running:
        yield running.start_service(), running.load(tiny_onnx_folder, "support-desk").id


def test_foundry_local_answers_and_refuses(run, foundry):
    """The tiny model is not trained, so it answers no JSON: what it streamed is printed, and then that is said."""
    url, model = foundry
    code, printed, complaint = run(url, model, "Where is my card?", "--stream")
    assert code == 1
    assert printed.strip("\n") or printed.count("\n") > 1, "nothing was streamed"
    assert complaint.startswith("The reply is not JSON (")
    code, printed, complaint = run(url, "no-such-model", "Where is my card?")
    assert (code, printed) == (1, "")
    assert complaint.startswith("The service refused the request with HTTP status 4")
    assert complaint.endswith("check that it has the model no-such-model.")
