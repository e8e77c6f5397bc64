"""The one base class of every error a learner may meet."""


class CourseError(Exception):
    """One sentence: what was found, what was expected, and what to do next."""
