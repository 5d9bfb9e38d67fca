"""Random numbers that are a function of where they are used: of a seed, a purpose and a position, and of nothing else.

So an utterance's noise does not depend on who shares its batch, on how long it becomes, or in which bites it is spoken.
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a counter in, random bits out, no
state. Plain torch, for any device, to be compiled or captured; ``t3.choosing`` draws the same bits.
"""

from typing import Final

import torch

TOKENS: Final = 0
"""T3's choice: position is the step, lane is the token."""
FLOW: Final = 1
"""Where the flow begins: position is the frame of the mel spectrogram, lane is its band."""
PHASES: Final = 2
"""Of the source's harmonics: lane is the harmonic."""
SOURCE: Final = 3
"""The source's breath, one for all harmonics: position is a quarter of the sample, lane is which of the four."""

GRAIN: Final = 2.0**-23
"""Between two neighbours of what ``uniform`` draws."""

_MASK: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10

Bits = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def word(seed: int) -> int:
    """The number with the same 64 bits that an int64 tensor holds; bits beyond do not count."""
    return (seed & (2**64 - 1)) - 2**64 * (seed >> 63 & 1)


def philox(counter: Bits, key: tuple[torch.Tensor, torch.Tensor]) -> Bits:
    """Four words of 32 random bits for each counter; words are int64 tensors, broadcast against each other."""
    first, second, third, fourth = counter
    key_0, key_1 = key
    for turn in range(_ROUNDS):
        if turn:
            key_0, key_1 = (key_0 + _WEYL[0]) & _MASK, (key_1 + _WEYL[1]) & _MASK
        # The product of two words overflows int64 into its sign, which the mask takes off again.
        left, right = first * _MULTIPLIERS[0], third * _MULTIPLIERS[1]
        first, second, third, fourth = (
            ((right >> 32) & _MASK) ^ second ^ key_0,
            right & _MASK,
            ((left >> 32) & _MASK) ^ fourth ^ key_1,
            left & _MASK,
        )
    return first, second, third, fourth


def drawn(seeds: torch.Tensor, purpose: int, positions: torch.Tensor, lanes: int) -> torch.Tensor:
    """Random bits, of shape ``(*positions.shape, lanes)``; ``seeds`` broadcast against ``positions``. int64."""
    quads = torch.arange((lanes + 3) // 4, device=positions.device)
    position, seed = positions.unsqueeze(-1), seeds.unsqueeze(-1)
    counter = (quads + torch.zeros_like(position), position, torch.full_like(position, purpose), position.new_zeros(()))
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., :lanes]


def uniform(bits: torch.Tensor) -> torch.Tensor:
    """Within (0, 1), never either end: 23 bits of each word and a half, which float32 holds exactly."""
    return ((bits >> 9).to(torch.float32) + 0.5) * GRAIN


def exponential(seeds: torch.Tensor, purpose: int, positions: torch.Tensor, lanes: int) -> torch.Tensor:
    """Of rate 1, shape as ``drawn``."""
    return -torch.log(uniform(drawn(seeds, purpose, positions, lanes)))


def normal(seeds: torch.Tensor, purpose: int, positions: torch.Tensor, lanes: int) -> torch.Tensor:
    """Of mean 0 and variance 1, shape as ``drawn`` (Box and Muller's, from pairs of lanes)."""
    even = lanes + lanes % 2
    radii, angles = uniform(drawn(seeds, purpose, positions, even)).unflatten(-1, (-1, 2)).unbind(-1)
    radii, angles = torch.sqrt(-2.0 * torch.log(radii)), 2.0 * torch.pi * angles
    return torch.stack((radii * torch.cos(angles), radii * torch.sin(angles)), dim=-1).flatten(-2)[..., :lanes]
