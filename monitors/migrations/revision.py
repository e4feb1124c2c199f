"""Which revision of the tables a store has, and what to do with one that is not this version's.

Alembic's own table `alembic_version` holds it. Stores of before there were revisions have none, and a
counter `schema` of 1: what they are is seen from their columns. Since then that counter is 2, which versions
of before refuse. Reading a revision needs no Alembic; only an upgrade imports it.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sentei.monitors.tables import COUNTERS

HEAD = "0003"  # of monitors/migrations/versions: a test holds the two together
FIRST = "0001"
SCHEMA = "schema"
SCHEMA_BEFORE, SCHEMA_SINCE = 1, 2  # the counter's value: before there were revisions, and since

VERSIONS = sa.Table(
    "alembic_version",
    sa.MetaData(),
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)

# What a store has that was last opened by the version just before there were revisions.
_MARKS_OF_0002 = {
    "arrivals": {"session_id"},
    "requests": {"audit_probability"},
    "audits": {"prompt_tokens", "share", "audit_probability", "span_start", "reason", "artifact"},
}
_INDEXES_OF_0002 = {"events_by_kind", "events_decisions"}


def find_revision(connection: Connection) -> str | None:
    """The revision of a store, or None for a database in which Sentei has no tables yet."""
    inspector = sa.inspect(connection)
    if inspector.has_table(VERSIONS.name):
        found = connection.execute(sa.select(VERSIONS.c.version_num)).scalar()
        if found is not None:
            return str(found)
    if not inspector.has_table(COUNTERS.name):
        return None
    schema = connection.execute(sa.select(COUNTERS.c.value).where(COUNTERS.c.name == SCHEMA)).scalar()
    if schema != SCHEMA_BEFORE:
        return f"schema version {schema}"
    return "0002" if _has_marks(inspector) else FIRST


def mark_revision(connection: Connection) -> None:
    """Write down, inside the transaction that made them, that a new store has this version's tables."""
    VERSIONS.create(connection)
    connection.execute(sa.insert(VERSIONS).values(version_num=HEAD))
    connection.execute(sa.insert(COUNTERS).values(name=SCHEMA, value=SCHEMA_SINCE))


def refusal(url: str, revision: str) -> str | None:
    """Why a store of another revision is not opened, and the way out; None for one of this version's."""
    if revision == HEAD:
        return None
    if revision.isdigit() and revision < HEAD:
        return (
            f"store {url} is of an older version (revision {revision}, this Sentei's is {HEAD}): "
            f"stop the app that uses it, then run: sentei store upgrade --store '{url}'"
        )
    return (
        f"store {url} is of a version that this Sentei does not know ({revision}, its own is {HEAD}): "
        "use the Sentei that wrote it or a newer one, or point to another database."
    )


def _has_marks(inspector: sa.Inspector) -> bool:
    for table, columns in _MARKS_OF_0002.items():
        if not inspector.has_table(table):
            return False
        if not columns <= {column["name"] for column in inspector.get_columns(table)}:
            return False
    return {str(index["name"]) for index in inspector.get_indexes("events")} >= _INDEXES_OF_0002
