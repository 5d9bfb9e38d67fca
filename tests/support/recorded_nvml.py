"""NVML as a machine with GPUs answered it, or as a test writes it: the functions of ``pynvml``, from JSON.

The JSON maps a call, such as ``nvmlDeviceGetName(gpu0)``, to its answers in the order in which they were given; the
last one is repeated. An object stands for a structure, ``{"NVMLError": 3}`` for an error. A call that is not there is
not supported. scripts/gpu/record.py writes such files.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pynvml

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class RecordedNvml:
    """See the top of this module."""

    def __init__(self, answers: Mapping[str, Sequence[Any]]) -> None:
        self._left = {call: list(given) for call, given in answers.items()}

    def __getattr__(self, function: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            # A structure that is filled in, or a sample, has no name.
            named = ", ".join(str(each) for each in arguments if isinstance(each, str | int))
            left = self._left.get(f"{function}({named})", [{"NVMLError": pynvml.NVML_ERROR_NOT_SUPPORTED}])
            answer = _revived(left.pop(0) if len(left) > 1 else left[0])
            # ctypes wants a pointer where a sample goes.
            return pynvml.c_nvmlGpmSample_t() if function == "nvmlGpmSampleAlloc" else answer

        return call


def _revived(value: Any) -> Any:
    if isinstance(value, list):
        return [_revived(each) for each in value]
    if isinstance(value, dict):
        if "NVMLError" in value:
            raise pynvml.NVMLError(value["NVMLError"])
        return SimpleNamespace(**{name: _revived(each) for name, each in value.items()})
    return value
