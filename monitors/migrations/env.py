"""What Alembic runs: the migrations of a store, on the connection and in the transaction that it is given."""

from __future__ import annotations

from alembic import context

from sentei.monitors.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()
