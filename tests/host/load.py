"""A steady load of POSTs for a while; prints what came back as JSON. Runs inside the sandbox, standard library only.

load.py URL RATE_PER_S SECONDS
"""

from __future__ import annotations

import collections
import io
import json
import sys
import threading
import time
import urllib.error
import urllib.request
import wave


def speak(url: str, text: str) -> tuple[str, str]:
    """(outcome, instance) of one request; ``ok`` only if the audio is whole."""
    body = json.dumps({"input": text, "response_format": "wav"}).encode()
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            audio, instance = response.read(), response.headers["X-Instance"]
            promised_s = float(response.headers["X-Audio-Duration"])
    except urllib.error.HTTPError as error:
        with error:
            return f"status {error.code}: {error.read(200)!r}", error.headers.get("X-Instance", "")
    except OSError as error:
        return f"{type(error).__name__}: {error}", ""
    with wave.open(io.BytesIO(audio)) as decoded:
        lasts_s = decoded.getnframes() / decoded.getframerate()
    whole = lasts_s > 0.2 and abs(lasts_s - promised_s) < 0.01
    return ("ok" if whole else f"{lasts_s} s of audio, {promised_s} s promised"), instance


def main() -> None:
    url, rate_per_s, seconds = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    outcomes: collections.Counter[str] = collections.Counter()
    instances: collections.Counter[str] = collections.Counter()
    lock = threading.Lock()

    def one(number: int) -> None:
        outcome, instance = speak(url, f"This is request number {number}.")
        with lock:
            outcomes[outcome] += 1
            instances[instance] += 1

    threads = []
    begin = time.monotonic()
    for number in range(int(rate_per_s * seconds)):
        time.sleep(max(0.0, begin + number / rate_per_s - time.monotonic()))
        threads.append(threading.Thread(target=one, args=(number,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    print(json.dumps({"outcomes": outcomes, "instances": instances}))


if __name__ == "__main__":
    main()
