"""MLflow's model registry, opened quietly and quickly: in an SQLite file by default, or on a server.

Importing MLflow takes one to three seconds, so nothing here is opened before it is asked.
"""

import functools
import os
import sqlite3
import uuid
import warnings
from contextlib import AbstractContextManager
from pathlib import Path

from slmops_course.errors import CourseError

NOT_THERE = "RESOURCE_DOES_NOT_EXIST"
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",  # its own handler prints what it does to a new database
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # of 7, which take two minutes to say that no server is there
}


class BookError(CourseError):
    """A registry that cannot be opened or does not answer as it should."""


class Book:
    """MLflow's client, with errors in one sentence.

    Example: `Book("http://127.0.0.1:5000").ask("get_registered_model", "support-desk", missing=None)`
    """

    def __init__(self, uri: str):
        self.uri = uri

    def ask(self, method: str, *values, missing=..., **options):
        """Call a method of mlflow.MlflowClient. What is not there is `missing`, if that is given.

        Raises BookError, with MLflow's own first words.
        """
        client = self._client
        from mlflow.exceptions import MlflowException

        try:
            return getattr(client, method)(*values, **options)
        except MlflowException as error:
            if missing is not ... and error.error_code == NOT_THERE:
                return missing
            raise self._error(method, error) from error

    @functools.cached_property
    def _client(self):
        client_class, errors = _import_mlflow()
        try:
            return client_class(tracking_uri=self.uri, registry_uri=self.uri)
        except errors as error:
            raise self._error("client", error) from error

    def _error(self, what: str, error: Exception) -> BookError:
        words = (str(error).splitlines() or [type(error).__name__])[0]
        return BookError(f"MLflow's {what} failed at {self.uri} ({words}): expected a registry that answers; look there.")


def open_file(path: Path, lock: AbstractContextManager) -> Book:
    """The book in an SQLite file; if it is not there it is made, under the lock, and appears whole.

    Raises BookError when the file cannot be written, its path has a ? or %, or MLflow is not installed.
    """
    if {"?", "%"} & set(str(path)):
        raise BookError(f"{path} has a ? or % in it, which an address of MLflow cannot have: expected another folder.")
    if not path.exists():
        blank = _blank_database()  # takes its time, so before the lock
        with lock:
            if not path.exists():
                _write_whole(path, blank)
    # Not quoted: MLflow would make a folder of the quoted name as well.
    return Book(f"sqlite:///{path.as_posix()}")


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BookError(f"{path} cannot be written ({error.strerror}): expected room for a megabyte; make some.") from error


@functools.cache
def _blank_database() -> bytes:
    """MLflow's empty tables. It makes them by some seventy migrations, each of which waits for the disk, 5 s together and
    half a database if it is killed: in memory they take less than a second, and arrive in the file whole.
    """
    client_class, _ = _import_mlflow()
    # A file in memory that this process's connections share, as its name begins with a slash. Written so, the slash does
    # not make MLflow create a folder: https://sqlite.org/src/file/src/memdb.c
    name = f"file:%2Fslmops-{uuid.uuid4()}?vfs=memdb"
    connection = sqlite3.connect(name, uri=True)
    client_class(tracking_uri=f"sqlite:///{name}&uri=true", registry_uri=f"sqlite:///{name}&uri=true")
    return connection.serialize()


def _import_mlflow():
    """MLflow's client class, and the errors with which it may fail to open."""
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    try:
        with warnings.catch_warnings():
            # MLflow 3.17 asks SQLAlchemy 2.1 for a loading strategy that is deprecated there, when it sets up its tables.
            warnings.filterwarnings("ignore", message="The ``noload`` loader strategy", category=DeprecationWarning)
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
            from mlflow.store.tracking import sqlalchemy_store  # noqa: F401
            from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise BookError(
            f"MLflow cannot be imported ({error}): expected mlflow-skinny, sqlalchemy and alembic; "
            "pip install -c constraints.txt mlflow-skinny sqlalchemy alembic."
        ) from error
    return MlflowClient, (MlflowException, SQLAlchemyError)
