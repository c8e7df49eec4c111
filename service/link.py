"""The cluster that API and runner speak to now; a local head that had to be started again takes the place of the old one."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.ray_rest import RayRest


@dataclass
class Link:
    ray: RayRest
    serve_host: str
    serve_port: int

    def serve_url(self, app: str) -> str:
        """Where an app answers: a base's by its catalogue id, a whole tuned model's by its job's id."""
        return f"http://{self.serve_host}:{self.serve_port}/{app}"
