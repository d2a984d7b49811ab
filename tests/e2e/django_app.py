"""A Django of one file, with request metrics."""

import os
from typing import Any

import django
from django.conf import settings
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse
from django.urls import include, path

import consul_prom


def pid(_request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(os.getpid()))


def item(request: HttpRequest, item: object) -> HttpResponse:
    return HttpResponse(f"{item} at {request.resolver_match.route} by {os.getpid()}")


def fail(_request: HttpRequest) -> HttpResponse:
    raise LookupError("mine")


urlpatterns = (
    path("pid", pid),
    path("shop/<int:item>", item),
    path("blue/", include(((path("<slug:item>/", item),), "blue"))),
    path("fail", fail),
)
settings.configure(ROOT_URLCONF=urlpatterns, ALLOWED_HOSTS=["*"], LOGGING_CONFIG=None)
django.setup()


def handler() -> Any:
    """One more, as Django makes them."""
    return WSGIHandler()


app = consul_prom.wsgi.instrument(handler())
