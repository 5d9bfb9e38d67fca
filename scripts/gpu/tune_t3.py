"""Which blocks and warps suit each of T3's kernels for a few rows on this GPU: microseconds a layer, late and early.

python scripts/gpu/tune_t3.py | tee scripts/gpu/tune_t3.txt
"""

from __future__ import annotations

import itertools
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
from fast_t3 import timed

from chatterbox_server.engines.fast import kernels

LAYERS, D, HD, F = 30, 1024, 64, 4096


def captured(work: Any) -> Any:
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        work()
    return graph


def weights(*shape: int) -> list[torch.Tensor]:
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(LAYERS)]


def main() -> None:
    bf16 = torch.bfloat16
    m = 2
    x, x2 = torch.randn(m, D, device="cuda"), torch.randn(m, D, device="cuda")
    raised = torch.randn(m, F, device="cuda", dtype=bf16)
    parts = torch.randn(8, m, D, device="cuda")
    query = torch.randn(m, D, device="cuda")
    cache = torch.randn(2, 16, 1024, HD, device="cuda", dtype=bf16)
    angles = torch.randn(2048, HD, device="cuda")
    rows, at = (
        torch.arange(m, device="cuda", dtype=torch.int32),
        torch.full((m,), 300, device="cuda", dtype=torch.int32),
    )
    mixed, tops, sums = (
        torch.randn(m, 8, D, device="cuda"),
        torch.randn(m, 8, 16, device="cuda"),
        torch.rand(m, 8, 16, device="cuda") + 1,
    )
    w_qkv, w_out, w_up, w_down = weights(3 * D, D), weights(D, D), weights(2 * F, D), weights(D, F)
    norm = {"EPS": 1e-5, "GATED": True}

    def qkv(block, warps, n_parts, pdl):
        for w in w_qkv:
            kernels.qkv[(3 * D // (2 * block),)](
                x,
                parts,
                x2,
                w,
                w,
                angles,
                angles,
                rows,
                at,
                query,
                cache,
                cache,
                cache.stride(0),
                cache.stride(1),
                M=m,
                D=D,
                HD=HD,
                PARTS=n_parts,
                BLOCK=block,
                BIAS=False,
                EARLY=bool(pdl),
                num_warps=warps,
                **norm,
                **pdl,
            )

    def attend(block, splits, warps, pdl):
        for _ in range(LAYERS):
            kernels.attend[(m * 16, splits)](
                query,
                cache,
                cache,
                rows,
                at,
                mixed,
                tops,
                sums,
                cache.stride(0),
                cache.stride(1),
                D=D,
                HD=HD,
                SPLITS=splits,
                BLOCK=block,
                EARLY=bool(pdl),
                num_warps=warps,
                **pdl,
            )

    def project(block, splits, warps, pdl):
        for w in w_out:
            kernels.project[(D // block,)](
                x,
                mixed,
                tops,
                sums,
                w,
                w,
                M=m,
                D=D,
                HD=HD,
                SPLITS=splits,
                BLOCK=block,
                BIAS=False,
                EARLY=bool(pdl),
                num_warps=warps,
                **pdl,
            )

    def raise_(block, warps, pdl):
        for w in w_up:
            kernels.raise_[(F // block,)](
                x, raised, w, w, M=m, D=D, F=F, BLOCK=block, BIAS=False, EARLY=bool(pdl), num_warps=warps, **norm, **pdl
            )

    def lower(block, share, warps, pdl):
        for w in w_down:
            kernels.lower[(D // block, F // share)](
                raised,
                parts,
                w,
                w,
                M=m,
                D=D,
                F=F,
                SHARE=share,
                BLOCK=block,
                BIAS=False,
                EARLY=bool(pdl),
                num_warps=warps,
                **pdl,
            )

    grids = {
        raise_: ([4, 8, 16, 32], [4, 8, 16]),
        qkv: ([4, 8, 16], [4, 8], [4]),
        lower: ([4, 8, 16, 32], [1024, 2048], [4, 8]),
        project: ([4, 8], [2, 4, 8], [4, 8]),
        attend: ([32, 64], [4, 8], [2, 4]),
    }
    for work, grid in grids.items():
        results = []
        for told in itertools.product(*grid):
            for pdl in ({}, {"launch_pdl": True}):
                # qkv's last is its parts, which come before nothing of launch.
                try:
                    graph = captured(lambda: work(*told, pdl))
                    results.append((timed(graph.replay, 10) / LAYERS * 1000, told, bool(pdl)))
                except Exception as error:
                    print(work.__name__, told, type(error).__name__, str(error)[:80])
        for early in (False, True):
            best = sorted(r for r in results if r[2] == early)[:4]
            print(
                f"{work.__name__:<8} {'early' if early else 'late':<6}",
                "; ".join(f"{us:.2f} us {told}" for us, told, _ in best),
                flush=True,
            )


if __name__ == "__main__":
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        main()
