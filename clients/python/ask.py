"""Put one message to a model behind an OpenAI-compatible service and print its JSON answer.

    python ask.py http://127.0.0.1:5273/v1 support-desk "I lost my card" [--stream] [--system TEXT]

Needs `pip install openai`. A key, where the service wants one, comes from the environment variable OPENAI_API_KEY.
"""

import argparse
import json
import os
import sys

import openai


def ask(base_url: str, model: str, messages: list[dict], *, stream: bool) -> str:
    """The reply's text; with `stream`, its pieces are printed as they come."""
    key = os.environ.get("OPENAI_API_KEY") or "none-needed"
    options = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 256}
    with openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=60) as client:
        if not stream:
            return client.chat.completions.create(**options).choices[0].message.content or ""
        reply = ""
        for chunk in client.chat.completions.create(**options, stream=True):
            piece = chunk.choices[0].delta.content or "" if chunk.choices else ""
            print(piece, end="", flush=True)
            reply += piece
        print()
        return reply


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask a model one question.")
    parser.add_argument("base_url")
    parser.add_argument("model")
    parser.add_argument("message")
    parser.add_argument("--system", default="Answer with JSON.", help="the system message the model was trained with")
    parser.add_argument("--stream", action="store_true", help="print the reply as it is generated")
    options = parser.parse_args(arguments)
    messages = [{"role": "system", "content": options.system}, {"role": "user", "content": options.message}]
    try:
        reply = ask(options.base_url, options.model, messages, stream=options.stream)
        json.loads(reply)
    except openai.APIConnectionError as error:
        sys.exit(f"Nothing answers at {options.base_url} ({error}): start the service, or check the address.")
    except openai.APIStatusError as error:
        sys.exit(
            f"The service refused the request with HTTP status {error.status_code} ({error.message[:200]}): check that it has "
            f"the model {options.model}."
        )
    except json.JSONDecodeError as error:
        sys.exit(f"The reply is not JSON ({error}): check that this model was trained for the task.")
    except (openai.OpenAIError, AttributeError, IndexError, TypeError) as error:  # the library takes any body for an answer
        sys.exit(f"The service's answer cannot be read ({error}): check that it is OpenAI-compatible.")
    if not options.stream:
        print(reply)


if __name__ == "__main__":
    main()
