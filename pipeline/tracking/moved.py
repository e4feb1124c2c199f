"""A home that was copied or moved: MLflow keeps absolute addresses of artifacts, so they are made to follow.

Without this a copy would write into the home that it was copied from, and a moved one would find nothing.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

_SCHEME = "sqlite:///"
# Where MLflow's tables hold addresses of artifacts.
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)


def follow_home(tracking_uri: str, artifact_root: Path) -> None:
    """Point every artifact of a home's own database at this home; does nothing where it is there already.

    Only a database that lies beside `artifact_root` belongs to the same home; another one is left alone.
    """
    database = Path(tracking_uri.removeprefix(_SCHEME))
    if not tracking_uri.startswith(_SCHEME) or not database.is_file():
        return
    if database.resolve().parent != artifact_root.resolve().parent:
        return
    here = artifact_root.resolve().as_uri()
    with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        for table, column in _ADDRESSES:
            if _has_column(connection, table, column):
                _rewrite(connection, table, column, here=here)


def _has_column(connection: sqlite3.Connection, table: str, column: str) -> bool:
    found = connection.execute("SELECT 1 FROM pragma_table_info(?) WHERE name = ?", (table, column))
    return found.fetchone() is not None


def _rewrite(connection: sqlite3.Connection, table: str, column: str, *, here: str) -> None:
    """Exchange all that stands before the artifacts' folder of another home; table and column are ours."""
    folder = f"/{here.rsplit('/', 1)[1]}/"
    rows = connection.execute(
        f"SELECT DISTINCT {column} FROM {table} WHERE {column} LIKE 'file:///%'"
    ).fetchall()
    for (address,) in rows:
        _, found, rest = address.rpartition(folder)
        if found and not address.startswith(f"{here}/"):
            connection.execute(
                f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (f"{here}/{rest}", address)
            )
