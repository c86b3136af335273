"""A run's newest line of metrics for Prometheus, on a port of its own."""

from salt_distill.common.metrics_line import STUDENT, MetricsLine


class Exporter:
    """``http://HOST:PORT/metrics``, in a thread, until it is closed."""

    def __init__(self, port: int) -> None:
        """Raises ValueError where the port is taken."""
        from prometheus_client import CollectorRegistry, Gauge, start_http_server  # for those who ask for it

        registry = CollectorRegistry()
        self._gauges = {metric.of: Gauge(metric.name, metric.help, registry=registry) for metric in STUDENT}
        for gauge in self._gauges.values():
            gauge.set(float("nan"))  # until there is a value
        try:
            self._server, self._thread = start_http_server(port, registry=registry)
        except OSError as error:
            raise ValueError(
                f"cannot listen on --metrics-port {port}: {error.strerror}: give another port"
            ) from error

    def show(self, line: MetricsLine) -> None:
        """From now on the metrics are these."""
        for name, gauge in self._gauges.items():
            if (value := getattr(line, name)) is not None:  # what few lines have stays as it was
                gauge.set(value)

    def close(self) -> None:
        """Gives the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
