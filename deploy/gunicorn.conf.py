"""What Gunicorn reads: gunicorn -c gunicorn.conf.py app:get_application."""

import consul_prom

bind = "0.0.0.0:8000"
workers = 4
worker_class = "aiohttp.GunicornWebWorker"
# A worker that is recycled leaves its slot to its successor, and with it the instance that Prometheus knows.
max_requests = 100_000
max_requests_jitter = 10_000
# A worker has to have deregistered, which takes CONSUL_PROM_STOP_TIMEOUT at most, before it is killed.
graceful_timeout = 30
# It would be made in the user's home, and a service's user has none.
control_socket_disable = True
# For the master and the workers alike.
raw_env = ["CONSUL_PROM_SERVICE=shop"]
# Last: our hooks join those above. They serve the workers, bury them, and tell what only the master knows.
consul_prom.gunicorn.install(globals())
