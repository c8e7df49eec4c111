"""The driver on the cluster: the five stages of one attempt.

    python -m service.launch RUN_DIR --attempt N

The runner writes `spec.json` (a JobSpec with paths that the cluster can read) and `launch.json` (this order) into the run
directory, takes the lease for attempt N, and submits this command as one Ray job.
"""

from __future__ import annotations

from trainers.records import Record


class LaunchOrder(Record):
    """What the driver must know beyond the job itself (`launch.json`)."""

    job_id: str
    model_name: str
    """The name that must answer when the job has succeeded (`ft:{base}:{org}:{suffix}:{id}`)."""
    models: str
    """Folder where base models are cached."""
    stores: str
    """Folder of the project's token stores."""
    serve_url: str | None = None
    """Where the serving app of the base answers, for example http://127.0.0.1:8000/smollm2-135m-instruct."""
    serve_token_file: str | None = None
    """File with the bearer token that the serving app asks for."""
