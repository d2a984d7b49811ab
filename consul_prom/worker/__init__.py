"""A running worker: its target, and the work of the leader for other workers."""

from consul_prom.worker.worker import Worker as Worker
from consul_prom.worker.worker import running as running
