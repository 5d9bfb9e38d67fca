"""Which part of a model lives on which device."""

from dataclasses import dataclass
from typing import Literal

from chatterbox_server.engine import Unable


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the two halves of a model live; inside a unit CUDA counts from 0 whatever cards those are."""

    t3: str
    """T3 and the voice encoder: text and voice to speech tokens."""
    s3gen: str
    """Speech tokens to sound, with the speaker encoder and the tokenizer that listen to a voice for it."""

    @property
    def split(self) -> bool:
        return self.t3 != self.s3gen

    @property
    def cards(self) -> tuple[str, ...]:
        """Devices of CUDA that are used, each once."""
        return tuple(sorted({device for device in (self.t3, self.s3gen) if device.startswith("cuda")}))


def place(device: Literal["cuda", "cpu"], visible_gpus: tuple[str, ...]) -> Placement:
    """One GPU takes all of it; of two, the first takes T3 and the second S3Gen.

    Raises:
        Unable: more than two GPUs, of which a model cannot make use.
    """
    if device == "cpu":
        return Placement("cpu", "cpu")
    if len(visible_gpus) > 2:
        given = ",".join(visible_gpus)
        msg = f"cannot place one model on {len(visible_gpus)} GPUs (CUDA_VISIBLE_DEVICES={given}): name one or two"
        raise Unable(msg)
    if len(visible_gpus) == 2:
        return Placement("cuda:0", "cuda:1")
    return Placement("cuda:0", "cuda:0")
