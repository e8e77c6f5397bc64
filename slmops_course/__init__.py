"""Small Language Model Operations, hands on: the package behind the four chapters.

Each module is one stage of a model's life, in this order: artifacts, models, chat, tasks, training, teachers, students,
adapters, optimize, serving, evaluation, benchmark. Importing does nothing; heavy libraries load inside the functions.
"""

__version__ = "0.1.0"
