"""The tuned model at work: ONNX Runtime GenAI in process, and Foundry Local in process and over its service.

Foundry Local here is the SDK's native runtime, on loopback only, with its non-essential telemetry off. Its service has
no authentication, so it must never listen on another address.
"""

import contextlib
import json
import os
import re
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from slmops_course.chat import MAX_NEW_TOKENS, ChatModel, Conversation, Reply
from slmops_course.errors import CourseError

GENAI_BATCH_SIZE = 16
SERVED_ALIAS = "support-desk"


class ServingError(CourseError):
    """A model that cannot be served, or a service that cannot start."""


class GenAIChatModel(ChatModel):
    """An ONNX model under ONNX Runtime GenAI, in this process."""

    def __init__(self, folder: Path, *, name: str | None = None):
        import onnxruntime_genai

        check_onnx_folder(folder)
        self.name = name or folder.name
        self._genai = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(folder))
        # The runtime's own tokenizer: transformers would cost more memory than the model.
        self._tokenizer = onnxruntime_genai.Tokenizer(self._model)
        self._end = int(self._tokenizer.eos_token_ids[0])

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The token ids of a conversation up to where the assistant's answer begins."""
        text = self._tokenizer.apply_chat_template(json.dumps(list(conversation)), add_generation_prompt=True)
        return self._tokenizer.encode(text).tolist()

    def generate(self, conversations, *, max_new_tokens=MAX_NEW_TOKENS):
        replies: dict[int, Reply] = {}
        by_length = defaultdict(list)
        for index, conversation in enumerate(conversations):
            prompt = self.prompt_ids(conversation)
            by_length[len(prompt)].append((index, prompt))
        # Only prompts of one length share a batch: grouped-query attention on the CPU knows no left padding.
        for same in by_length.values():
            for start in range(0, len(same), GENAI_BATCH_SIZE):
                indexes, prompts = zip(*same[start : start + GENAI_BATCH_SIZE], strict=True)
                replies.update(zip(indexes, self._generate_batch(prompts, max_new_tokens), strict=True))
        return [replies[i] for i in range(len(conversations))]

    def reply_probability(self, conversation: Conversation, text: str) -> float:
        """The probability, 0 to 1, that the model gives to a whole reply, its end token included."""
        import numpy as np
        from scipy.special import log_softmax

        prompt = self.prompt_ids(conversation)
        reply = np.array([*self._tokenizer.encode(text).tolist(), self._end])
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + len(reply) + 1, batch_size=1)
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(np.array([[*prompt, *reply]], dtype=np.int32))
        logits = generator.get_output("logits")[0, len(prompt) - 1 : -1].astype(np.float64)
        return float(np.exp(log_softmax(logits, axis=1)[np.arange(len(reply)), reply].sum()))

    def _generate_batch(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[Reply]:
        import numpy as np

        start = time.perf_counter()
        first_s = None
        length = len(prompts[0])
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=length + max_new_tokens, batch_size=len(prompts))
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            if first_s is None:
                first_s = time.perf_counter() - start
        latency_s = time.perf_counter() - start
        replies = []
        for number in range(len(prompts)):
            ids = generator.get_sequence(number)[length:].tolist()
            count = ids.index(self._end) + 1 if self._end in ids else len(ids)
            text = self._tokenizer.decode([i for i in ids[:count] if i != self._end])
            replies.append(Reply(text, length, count, first_s, latency_s))
        return replies

    def close(self):
        self._model = self._tokenizer = None


def check_onnx_folder(folder: Path) -> None:
    """Raise ServingError unless the folder holds an ONNX model with its generation configuration and tokenizer."""
    missing = [name for name in ("genai_config.json", "model.onnx", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise ServingError(
            f"{folder} has no {', no '.join(missing)}: expected an ONNX model built for ONNX Runtime GenAI; build one "
            "with `slmops run` or Olive's ModelBuilder."
        )


class FoundryLocal:
    """The Foundry Local runtime in this process, its service included. Use it as a context manager.

    Example:
        with FoundryLocal(Path("build/foundry")) as foundry:
            model = foundry.load(folder, "support-desk", version=1)
            print(foundry.start_service())      # http://127.0.0.1:…/catalogs/local/v1

    There can be one a process: Foundry Local's manager is a singleton. In a notebook, where a `with` block cannot span
    cells, call `start` in one cell and `close` in another.
    """

    def __init__(self, data_folder: Path, *, port: int = 0):
        self.data_folder, self.port = data_folder, port
        self._manager = None

    def start(self) -> "FoundryLocal":
        """Start the runtime; the service starts later, see `start_service`. Raises ServingError where it cannot."""
        sdk = _import_sdk()
        if sdk.FoundryLocalManager.instance is not None:
            raise ServingError(
                "Foundry Local runs in this process already: expected one at a time; close the other, or restart the kernel."
            )
        if self.port:
            check_port_free(self.port)
        # The runtime sends essential telemetry unless it believes to run in continuous integration.
        os.environ.setdefault("CI", "true")
        try:
            self.data_folder.mkdir(parents=True, exist_ok=True)
            sdk.FoundryLocalManager.initialize(
                sdk.Configuration(
                    app_name="slmops",
                    app_data_dir=str(self.data_folder.resolve()),
                    log_level=sdk.LogLevel.ERROR,
                    disable_nonessential_telemetry=True,
                    web=sdk.Configuration.WebService(urls=f"http://127.0.0.1:{self.port}"),
                )
            )
        except (OSError, sdk.FoundryLocalException) as error:
            raise ServingError(
                f"Foundry Local could not start with its data in {self.data_folder} ({plain_words(error)}): expected a "
                "folder that can be written to; choose another."
            ) from error
        self._manager = sdk.FoundryLocalManager.instance
        return self

    def __enter__(self) -> "FoundryLocal":
        return self.start()

    def __exit__(self, *error):
        self.close()

    def load(self, folder: Path, alias: str = SERVED_ALIAS, *, version: int = 1):
        """Register an ONNX folder as `alias-generic-cpu:version`, once, and load it. Returns Foundry Local's model.

        Another folder under the same version takes the place of the one that was there.
        Raises ServingError for a folder that holds no whole ONNX model, and a name or version that cannot be registered.
        """
        sdk = _import_sdk()
        check_onnx_folder(folder)
        catalog = self._catalog()
        model_id = model_identifier(alias, version)
        try:
            model = catalog.get_model_variant(model_id)
            if model is not None and Path(model.get_path()).resolve() != folder.resolve():
                if model.is_loaded:
                    model.unload()
                catalog.unregister_model(model_id)
                model = None
            if model is None:
                with sdk.ModelInfoBuilder() as info:
                    info.set_string_property("task", "chat-completion")
                    model = catalog.register_model(str(folder.resolve()), model_id, info)
            model.load()
        except sdk.FoundryLocalException as error:
            raise ServingError(
                f"Foundry Local could not load {model_id} ({plain_words(error)}): expected a whole ONNX model in {folder} "
                "and no open request to the one it replaces; build it again, or load it as another version."
            ) from error
        return model

    def versions(self, alias: str = SERVED_ALIAS) -> list[str]:
        """The registered versions of a model, newest first."""
        model = self._catalog().get_model(f"{alias}-generic-cpu") or self._catalog().get_model(alias)
        return [variant.id for variant in model.variants] if model else []

    def start_service(self) -> str:
        """Start the OpenAI-compatible service on loopback, once, and return its base address for the local catalogue."""
        sdk, manager = _import_sdk(), self._running()
        try:
            if not manager.urls:
                manager.start_web_service()
        except sdk.FoundryLocalException as error:
            raise ServingError(
                f"Foundry Local's service could not start on port {self.port} ({plain_words(error)}): expected a free "
                "one; choose another with --port, or leave it out to get any free port."
            ) from error
        return f"{manager.urls[0].rstrip('/')}/catalogs/local/v1"

    def close(self) -> None:
        """Stop the service, unload what was loaded and free the runtime. Safe to call twice, and after an error."""
        if self._manager is None:
            return
        manager, self._manager = self._manager, None
        try:
            if manager.urls:
                with contextlib.suppress(_import_sdk().FoundryLocalException):
                    manager.stop_web_service()
        finally:
            manager.close()  # ends sessions that are still open, then unloads the models

    def _running(self):
        if self._manager is None:
            raise ServingError(
                "Foundry Local is not running: expected it to be entered and not yet closed; use `with FoundryLocal(…) as …`."
            )
        return self._manager

    def _catalog(self):
        from foundry_local_sdk.catalog import CatalogType

        return self._running().get_catalog(CatalogType.LOCAL)


class FoundryChatModel(ChatModel):
    """A model that is loaded in Foundry Local, asked in process. `schema` constrains the replies to a JSON schema."""

    def __init__(self, model, *, schema: Mapping | None = None, name: str = "Foundry Local, in process"):
        self.model, self.schema, self.name = model, schema, name

    def generate(self, conversations, *, max_new_tokens=MAX_NEW_TOKENS):
        return [self._ask(conversation, max_new_tokens) for conversation in conversations]

    def stream(self, conversation: Conversation, *, max_new_tokens: int = MAX_NEW_TOKENS) -> Iterator[str]:
        """Yield the reply piece by piece, as it is generated. Raises ServingError for a request that is refused."""
        sdk = _import_sdk()
        try:
            # A session keeps its turns: one session for each independent request.
            with sdk.ChatSession(self.model) as session, self._request(conversation) as request:
                session.set_options(self._options(max_new_tokens)).set_streaming(True)
                with session.process_streaming_request(request) as stream:
                    for item in stream:
                        yield item.text
                    self._usage = stream.final_response.get_usage()
        except sdk.FoundryLocalException as error:
            raise ServingError(
                f"Foundry Local refused the request ({plain_words(error)}): expected a loaded model and a conversation "
                "with words in it that fits its context; check the message with Task.check_message first."
            ) from error

    def _ask(self, conversation: Conversation, max_new_tokens: int) -> Reply:
        start, first_s, pieces = time.perf_counter(), None, []
        for piece in self.stream(conversation, max_new_tokens=max_new_tokens):
            first_s = first_s or time.perf_counter() - start
            pieces.append(piece)
        latency_s = time.perf_counter() - start
        usage = self._usage
        return Reply("".join(pieces), usage.prompt_tokens, usage.completion_tokens, first_s or latency_s, latency_s)

    def _request(self, conversation: Conversation):
        sdk = _import_sdk()
        request = sdk.Request()
        for message in conversation:
            make = getattr(sdk.MessageItem, message["role"])
            request.add_item(make(message["content"]))
        return request

    def _options(self, max_new_tokens: int):
        sdk = _import_sdk()
        guidance = {"guidance_type": "json_schema", "guidance_data": json.dumps(bare_schema(self.schema or {}))}
        search = sdk.SearchOptions(temperature=0.0, max_output_tokens=max_new_tokens)
        return sdk.RequestOptions(search=search, additional_options=guidance if self.schema else {})


class OpenAIChatModel(ChatModel):
    """Any OpenAI-compatible endpoint: Foundry Local's service, Ollama, vLLM, llama.cpp's server, Azure AI Foundry.

    `schema` constrains the replies to a JSON schema, by a grammar as Foundry Local's service takes it. The key comes from
    `api_key` or the environment variable OPENAI_API_KEY; a service on loopback needs none.
    Raises ServingError when nothing answers at the address, and when the service refuses a request.
    """

    def __init__(self, base_url: str, model: str, *, schema: Mapping | None = None, name: str = "", api_key: str = ""):
        import openai

        key = api_key or os.environ.get("OPENAI_API_KEY") or "not-needed-on-loopback"
        self.client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=120)
        self.model, self.schema, self.name = model, schema, name or f"{model} over HTTP"

    def generate(self, conversations, *, max_new_tokens=MAX_NEW_TOKENS):
        return [self._ask(conversation, max_new_tokens) for conversation in conversations]

    def _ask(self, conversation: Conversation, max_new_tokens: int) -> Reply:
        import openai

        start, first_s, pieces, usage = time.perf_counter(), None, [], None
        constraint = {"type": "lark_grammar", "lark_grammar": json_grammar(self.schema or {})}
        try:
            stream = self.client.chat.completions.create(
                model=self.model, messages=list(conversation), max_tokens=max_new_tokens, temperature=0, stream=True,
                stream_options={"include_usage": True}, extra_body={"response_format": constraint} if self.schema else {},
            )  # fmt: skip
            for chunk in stream:
                piece = chunk.choices[0].delta.content if chunk.choices else None
                if piece:
                    first_s = first_s or time.perf_counter() - start
                    pieces.append(piece)
                usage = chunk.usage or usage
        except openai.APIConnectionError as error:
            raise ServingError(
                f"Nothing answers at {self.client.base_url} ({error}): expected an OpenAI-compatible service; start it, "
                "for example with `slmops serve`."
            ) from error
        except openai.APIStatusError as error:
            raise ServingError(
                f"The service refused the request with HTTP status {error.status_code} ({error.message[:200]}): expected "
                f"it to know the model {self.model} and take the conversation; its models are at "
                f"{self.client.base_url}models."
            ) from error
        latency_s = time.perf_counter() - start
        counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, len(pieces))
        return Reply("".join(pieces), *counts, first_s or latency_s, latency_s)

    def close(self):
        self.client.close()


def bare_schema(schema: Mapping) -> dict:
    """A JSON schema without its annotations, and with compact JSON asked for.

    Foundry Local takes it bare, not in OpenAI's wrapping of name and schema.
    """
    return {key: value for key, value in schema.items() if key not in ("$schema", "title", "description")} | {
        "x-guidance": {"whitespace_flexible": False}
    }


def json_grammar(schema: Mapping) -> str:
    """A Lark grammar that accepts only JSON by this schema, its fields in the schema's order.

    Example: {"properties": {"a": {"enum": ["x"]}}} -> 'start: %json {"properties": {"a": {"enum": ["x"]}}, …}'
    `%json` is an extension of llguidance: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md

    Given the schema itself, Foundry Local's service sorts the fields by name, and so asks a model for its answer in an
    order that it did not learn. In process it does not.
    """
    return f"start: %json {json.dumps(bare_schema(schema))}"


def model_identifier(alias: str, version: int) -> str:
    """Foundry Local's id of a local model. Raises ServingError for a name or version it would refuse."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", alias) or version < 1:
        raise ServingError(
            f"{alias!r} version {version} cannot be registered: expected lower-case letters, digits and hyphens, and a "
            "version from 1."
        )
    return f"{alias}-generic-cpu:{version}"


def check_port_free(port: int) -> None:
    """Raise ServingError when something listens on the loopback port already."""
    with socket.socket() as probe:
        if os.name == "posix":  # else a service that ended a moment ago still seems to hold its port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise ServingError(
                f"Port {port} is in use or not allowed ({getattr(error, 'strerror', None) or error}): expected a free "
                "one; choose another with --port, or leave it out to get any free port."
            ) from error


def plain_words(error: Exception) -> str:
    """An error of Foundry Local's runtime without the place in its source that it starts with.

    Example: "manager.cc:519 void fl::Manager::StartWebService() web service is already running"
    -> "web service is already running"
    """
    return re.sub(r"^\w+\.cc:\d+ [^()]*\([^()]*\)\s*(const\s+)?", "", str(error))


def _import_sdk():
    try:
        import foundry_local_sdk
    except ImportError as error:
        raise ServingError(
            "The Foundry Local SDK is not installed: expected foundry-local-sdk in this environment; run `make course`, or "
            "`pip install foundry-local-sdk`."
        ) from error
    return foundry_local_sdk
