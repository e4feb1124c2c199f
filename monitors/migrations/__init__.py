"""The history of the store's tables: one file per revision, run by Alembic inside one transaction."""
