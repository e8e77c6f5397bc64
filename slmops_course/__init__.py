"""Small Language Model Operations, hands on: the package behind the four chapters.

Each module is one stage of a model's life, in this order: artifacts, models, chat, tasks, training, teachers, students,
adapters, optimize, serving, evaluation, benchmark. Heavy libraries load inside the functions. Importing does one thing: it
switches off ONNX Runtime's telemetry, which only a variable that is set before ONNX Runtime is loaded can do (seen with 1.31).
"""

import os

__version__ = "0.1.0"

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
