"""Runs migrations on the connection that `services.orchestrator.migrate` holds a lock with."""

from alembic import context

from services.orchestrator.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
