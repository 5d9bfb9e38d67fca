"""The voices that a request may name."""

import asyncio

from fastapi import APIRouter

from chatterbox_server.service import Shared

router = APIRouter(prefix="/v1/audio", tags=["audio"])


@router.get("/voices")
async def voices(service: Shared) -> dict[str, object]:
    """Built-in, recorded, and the names that OpenAI's clients send."""
    found = await asyncio.to_thread(service.voices.voices)
    rows = [{"id": voice.name, "name": voice.name, "kind": voice.kind} for voice in found.values()]
    return {"object": "list", "voices": rows}
