"""A steady load of POSTs for a while; prints what came back as JSON. Runs inside the sandbox, standard library only.

load.py URL RATE_PER_S SECONDS [spelt]
load.py URL RATE_PER_S FILE            until the file is there

API_KEY_FILE in the environment holds the key that each request brings, as it is at that moment.

``spelt``: each text names the milliseconds of its sound, no two the same, as faulty_server.py speaks them; an answer
to another request is then not ``ok``.
"""

from __future__ import annotations

import collections
import http.client
import io
import itertools
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
import wave
from pathlib import Path


def speak(url: str, text: str, spelt_s: float | None) -> tuple[str, str]:
    """(outcome, instance) of one request; ``ok`` only if the audio is whole, and as long as its text spells."""
    body = json.dumps({"input": text, "response_format": "wav"}).encode()
    headers = {"Content-Type": "application/json"}
    if "API_KEY_FILE" in os.environ:
        headers["Authorization"] = f"Bearer {Path(os.environ['API_KEY_FILE']).read_text().strip()}"
    request = urllib.request.Request(url, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            audio, instance = response.read(), response.headers["X-Instance"]
            promised_s = float(response.headers["X-Audio-Duration"])
    except urllib.error.HTTPError as error:
        with error:
            return f"status {error.code}: {error.read(200)!r}", error.headers.get("X-Instance", "")
    except http.client.IncompleteRead:
        return "cut short", ""
    except OSError as error:
        return f"{type(error).__name__}: {error}", ""
    with wave.open(io.BytesIO(audio)) as decoded:
        lasts_s = decoded.getnframes() / decoded.getframerate()
    whole = lasts_s > 0.2 and abs(lasts_s - promised_s) < 0.01
    if not whole or (spelt_s is not None and round(lasts_s, 3) != spelt_s):
        return f"{lasts_s} s of audio, {promised_s} s promised, {spelt_s} s spelt", instance
    return "ok", instance


def main() -> None:
    url, rate_per_s, end, spelt = sys.argv[1], float(sys.argv[2]), sys.argv[3], sys.argv[4:] == ["spelt"]
    outcomes: collections.Counter[str] = collections.Counter()
    instances: collections.Counter[str] = collections.Counter()
    lock = threading.Lock()

    def one(number: int) -> None:
        if spelt:
            text = f"This is request number {number}, and it lasts 2000 milliseconds more."
            outcome, instance = speak(url, text, (2000 + number) / 1000)
        else:
            outcome, instance = speak(url, f"This is request number {number}.", None)
        with lock:
            outcomes[outcome] += 1
            instances[instance] += 1

    threads = []
    begin = time.monotonic()
    numbers = itertools.takewhile(lambda _: not Path(end).exists(), itertools.count())
    for number in numbers if end.startswith("/") else range(int(rate_per_s * float(end))):
        time.sleep(max(0.0, begin + number / rate_per_s - time.monotonic()))
        threads.append(threading.Thread(target=one, args=(number,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    print(json.dumps({"outcomes": outcomes, "instances": instances}))


if __name__ == "__main__":
    main()
