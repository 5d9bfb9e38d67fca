"""What Prometheus scrapes."""

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response

from chatterbox_server.service import Shared

router = APIRouter(tags=["health"])


@router.get("/metrics", summary="Metrics", response_class=PlainTextResponse)
async def metrics(service: Shared) -> Response:
    """Counts and measurements of this process since it started, in Prometheus' text format."""
    # On the event loop: all of it is read at once, and a thread would only wait behind those that encode sound.
    text, media_type = service.metrics.exposition()
    return Response(text, media_type=media_type)
