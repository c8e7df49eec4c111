"""The cluster that API and runner speak to now; a local head that had to be started again takes the place of the old one."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from cluster.ray_rest import RayRest


@dataclass
class Link:
    ray: RayRest
    serve_host: str
    serve_port: int
    changed: threading.Event = field(default_factory=threading.Event, compare=False)
    """Set by the API when there is something for the runner to do, so that nobody waits for its next look."""

    def serve_url(self, app: str) -> str:
        """Where an app answers: a base's by its catalogue id, a whole tuned model's by its job's id."""
        return f"http://{self.serve_host}:{self.serve_port}/{app}"
