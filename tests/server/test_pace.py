"""A right reading passes; one that stopped early or rambled does not."""

import dataclasses
import shutil

import pytest

from chatterbox_server import pace
from chatterbox_server.engine import Errand
from chatterbox_server.engines import espeak
from server.fakes import an_utterance

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")

SENTENCE = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps in the sun until the evening comes back again."
)

READ = [
    ("en", "Hi."),
    ("en", "No"),
    ("en", SENTENCE),
    ("en", "In 1984 there were 1,234,567 of them, i.e. 12.5 % more than in 2000."),
    ("en", "WWW and BBC, UNESCO & NATO"),
    ("en", "Call 0800 123 456 789 now! Or write to a.b@example.com; see https://example.com/x?y=1."),
    ("en", "Great 🙂🙂"),
    ("en", "3.14159265358979"),
    ("en", "2000000"),
    ("de", "Donaudampfschifffahrtsgesellschaftskapitän Müller kam am 31.12.1999 um 23:59 Uhr."),
    ("fr-fr", "Le 14 juillet 1789, quatre-vingt-dix-neuf personnes étaient là : 97, 98, 99."),
    ("es", "¿Cómo estás? ¡Muy bien, gracias! El tren sale a las 17:45."),
    ("it", "La volpe veloce salta sopra il cane pigro."),
    ("pl", "Chrząszcz brzmi w trzcinie w Szczebrzeszynie."),
    ("tr", "Çekoslovakyalılaştıramadıklarımızdan mısınız?"),
    ("fi", "Lentokonesuihkuturbiinimoottoriapumekaanikkoaliupseerioppilas"),
    ("ru", "В 2020 году он приехал в Москву и остался там навсегда."),
    ("el", "Η γρήγορη αλεπού πηδάει πάνω από το σκυλί."),
    ("hi", "यह एक वाक्य है। यह दूसरा वाक्य है।"),
    ("ar", "مرحبا بك في بيتنا. كيف حالك اليوم؟"),
    ("cmn", "他说：你好。我来了。然后走了。"),
    ("ko", "안녕하세요. 저는 학생입니다. 오늘은 날씨가 아주 좋습니다."),
    ("ja", "わたしはねこです。なまえはまだない。"),
]


@needs_espeak
@pytest.mark.parametrize("speed", [0.5, 1.0, 2.0])
def test_a_real_reading_is_never_rejected(speed: float) -> None:
    engine = espeak.load()
    assert {language for language, _ in READ} <= set(engine.languages)
    for language, text in READ:
        asked = dataclasses.replace(an_utterance(text), language=language, speed=speed)
        audio_s = engine.synthesize(asked, Errand()).size / engine.sample_rate_hz
        assert pace.implausible(text, audio_s, speed=speed) is None, (language, text)


@pytest.mark.parametrize(
    ("text", "audio_s", "reason"),
    [
        (SENTENCE, 0.3, "0.3 s for 110 characters: stopped early"),
        (SENTENCE, 2.5, "2.5 s for 110 characters: stopped early"),
        (SENTENCE, 5.0, None),
        (SENTENCE, 11.0, None),
        (SENTENCE, 40.0, "40.0 s for 110 characters: rambled"),
        ("Yes.", 0.3, None),
        ("Yes.", 4.0, None),
        ("Yes.", 0.0, "0.0 s for 4 characters: stopped early"),
        ("Yes.", 20.0, "20.0 s for 4 characters: rambled"),
        ("1,234,567", 8.0, None),
        ("1984", 0.6, None),
        ("今天天气很好我们去公园散步吧", 3.0, None),
        ("今天天气很好我们去公园散步吧", 0.5, "0.5 s for 14 characters: stopped early"),
        ("今天天气很好我们去公园散步吧", 25.0, "25.0 s for 14 characters: rambled"),
        ("***", 1.0, None),
        ("", 0.0, None),
    ],
)
def test_what_a_text_can_last(text: str, audio_s: float, reason: str | None) -> None:
    assert pace.implausible(text, audio_s) == reason


def test_who_speaks_twice_as_fast_takes_half_the_time() -> None:
    assert pace.implausible(SENTENCE, 2.5, speed=2.0) is None
    assert pace.implausible(SENTENCE, 2.5, speed=1.0) == "2.5 s for 110 characters: stopped early"
    assert pace.implausible(SENTENCE, 30.0, speed=0.5) is None
    assert pace.implausible(SENTENCE, 30.0, speed=1.0) == "30.0 s for 110 characters: rambled"
