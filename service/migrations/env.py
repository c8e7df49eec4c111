"""Run by alembic: apply revisions on the connection that Store.migrate opened."""

from alembic import context

from service.store import Row

context.configure(connection=context.config.attributes["connection"], target_metadata=Row.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
