"""Check that this prometheus_client has the internals that the ledger relies on."""

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, values

from consul_prom.errors import LedgerError
from consul_prom.ledger.values import MutexValue, plain


def check_library() -> None:
    """Whether prometheus_client's insides are those that we know.

    Raises:
        LedgerError: they are not, or its values are files. Nothing is tried then: it would be written to those.
    """
    found = getattr(values, "ValueClass", None)
    if getattr(found, "_multiprocess", False):
        raise LedgerError("prometheus_client is in multiprocess mode (PROMETHEUS_MULTIPROC_DIR)")
    try:
        registry = CollectorRegistry()
        counter, summary = Counter("c", "-", ("l",), registry=registry), Summary("s", "-", registry=None)
        histogram = Histogram("h", "-", registry=None, buckets=(1, 2))
        histogram.observe(2)
        child = counter.labels("x")
        known = [
            type(counter._metrics) is dict and counter._metrics == {("x",): child},
            all(set(vars(value)) == {"_value", "_exemplar", "_lock"} for value in plain(child)),
            all(type(value) is MutexValue for one in (child, summary, histogram) for value in plain(one)),
            [value.get() for value in plain(histogram)] == [2, 0, 1, 0],
            all(isinstance(one._created, float) for one in (child, summary, histogram)),
            histogram._upper_bounds[:2] == [1, 2],
            list(registry._collector_to_names) == [counter] == list({*registry._names_to_collectors.values()}),
            not registry._target_info,
            (counter._type, counter._name, counter._documentation) == ("counter", "c", "-"),
            (counter._unit, counter._labelnames) == ("", ("l",)),
        ]
        counter.clear()
        known.append(counter._metrics == {} and child._labelvalues == ("x",))
    except Exception as error:  # whatever an unknown version raises
        raise LedgerError(f"prometheus_client is of a version unknown to us: {error}") from error
    if not all(known):
        raise LedgerError("prometheus_client is of a version unknown to us")
