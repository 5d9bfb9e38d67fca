"""What the model knows of a voice, each half on the device that reads it; recordings are heard once and kept."""

import contextlib
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import librosa
import torch
from chatterbox.models.s3gen import S3GEN_SR
from chatterbox.models.s3tokenizer import S3_SR
from chatterbox.models.t3.modules.cond_enc import T3Cond

from chatterbox_server import recordings
from chatterbox_server.engine import LOOK_UP_S, Errand, Refused
from chatterbox_server.engines.stock import failures
from chatterbox_server.engines.stock.kinds import Kind
from chatterbox_server.engines.stock.placement import Placement
from chatterbox_server.recordings import NotARecording

LONGEST_RECORDING_S: Final = 120.0
"""The package reads 10 s of a recording for the sound and all of it for the likeness."""


@dataclass(frozen=True, slots=True)
class Voice:
    """Conditionals of which the package is only ever given copies, for it writes into them."""

    t3: Any
    s3gen: dict[str, Any]

    def for_t3(self) -> Any:
        return dataclasses.replace(self.t3)

    def for_s3gen(self) -> dict[str, Any]:
        """To be called where, and on the stream on which, they are used."""
        for heard in self.s3gen.values():
            if torch.is_tensor(heard) and heard.is_cuda:
                # A voice may be forgotten while this stream still reads it.
                heard.record_stream(torch.cuda.current_stream(heard.device))
        return dict(self.s3gen)


class Voices:
    """Of one model. Any thread may ask: what is known is found at once, also while a recording is heard."""

    def __init__(self, model: Any, kind: Kind, placement: Placement, *, kept: int) -> None:
        self._model = model
        self._kind = kind
        self._placement = placement
        self._most = kept
        self._kept: OrderedDict[tuple[Path, int, int], Voice] = OrderedDict()
        # Around a look at what is kept; around seconds in the package's encoders and S3Gen's tokenizer, which keep
        # state, and which nothing else uses.
        self._looks, self._hears = threading.Lock(), threading.Lock()
        on_s3gen = {
            name: heard.to(placement.s3gen) if torch.is_tensor(heard) else heard
            for name, heard in model.conds.gen.items()
        }
        self._built_in = Voice(dataclasses.replace(model.conds.t3), on_s3gen)

    def __len__(self) -> int:
        """Recordings whose conditionals are kept; answered on any thread."""
        return len(self._kept)

    def find(self, recording: Path | None, errand: Errand | None = None) -> Voice:
        """The voice of ``recording``, which is heard again when its file changed; the built-in one of ``None``.

        ``errand``: whose it is, if it is not at work yet; it is while its recording is heard, not while others' are.

        Raises:
            Dropped: ``errand`` was, before its turn.
            Refused: the recording cannot be used.
        """
        if recording is None:
            return self._built_in
        try:
            stat = recording.stat()
        except OSError as error:
            reason = f"voice {recording.stem}: cannot read the recording: {error.strerror}"
            raise Refused(reason, param="voice") from None
        key = (recording, stat.st_mtime_ns, stat.st_size)
        if (voice := self._known(key)) is not None:
            return voice
        with self._turn(errand):
            # Another may have heard it meanwhile.
            voice = self._known(key) or self._hear(recording)
            with self._looks:
                self._kept[key] = voice
                while len(self._kept) > self._most:
                    self._kept.popitem(last=False)
        return voice

    @contextlib.contextmanager
    def _turn(self, errand: Errand | None) -> Iterator[None]:
        while not self._hears.acquire(timeout=LOOK_UP_S):
            if errand is not None:
                errand.check()
        try:
            with contextlib.nullcontext() if errand is None else errand.at_work():
                yield
        finally:
            self._hears.release()

    def _known(self, key: tuple[Path, int, int]) -> Voice | None:
        with self._looks:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _hear(self, recording: Path) -> Voice:
        try:
            recordings.check(recording, shortest_s=self._kind.shortest_recording_s, longest_s=LONGEST_RECORDING_S)
        except NotARecording as error:
            reason = f"voice {recording.stem}: {error}"
            raise Refused(reason, param="voice") from error
        try:
            voice = self._heard(recording)
        except Exception as error:
            if isinstance(error, ImportError) or failures.of_the_gpu(error):
                raise
            reason = f"voice {recording.stem}: cannot use the recording: {failures.one_line(error)}"
            raise Refused(reason, param="voice") from error
        for card in self._placement.cards:
            # Whichever stream reads it need not ask whether it is there.
            torch.cuda.current_stream(card).synchronize()
        return voice

    def _heard(self, recording: Path) -> Voice:
        """As the package's ``prepare_conditionals``, which would put both halves on one device."""
        model, t3 = self._model, self._placement.t3
        sound, _ = librosa.load(str(recording), sr=S3GEN_SR)
        if self._kind.levels_recordings:
            sound = model.norm_loudness(sound, S3GEN_SR)
        sound_16k = librosa.resample(sound, orig_sr=S3GEN_SR, target_sr=S3_SR)
        for_s3gen = model.s3gen.embed_ref(sound[: model.DEC_COND_LEN], S3GEN_SR, device=self._placement.s3gen)
        prompt, _ = model.s3gen.tokenizer.forward(
            [sound_16k[: model.ENC_COND_LEN]], max_len=model.t3.hp.speech_cond_prompt_len
        )
        likeness = torch.from_numpy(model.ve.embeds_from_wavs([sound_16k], sample_rate=S3_SR))
        for_t3 = T3Cond(
            speaker_emb=likeness.mean(axis=0, keepdim=True),
            cond_prompt_speech_tokens=torch.atleast_2d(prompt),
            emotion_adv=0.5 * torch.ones(1, 1, 1),
        )
        return Voice(for_t3.to(device=t3), for_s3gen)
