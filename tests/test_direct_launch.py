"""Launches below Triton's Python: a driver that records must see the arguments that Triton's own way gives it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import CompiledKernel, LazyDict
from triton.runtime import driver

from hf_flash_mc.ops.hopper import plan as hopper_plan
from hf_flash_mc.ops.portable import plan

STREAM, FUNCTION = 7, 11
DESCRIPTOR = "tensordesc<bf16[1, 1, 64, 64]>"
META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 1, 64, 64], "fp4_padded": False}


@pytest.fixture
def launched() -> Iterator[list[Any]]:
    """What reaches the driver's C function: this Triton's real launcher over a driver that records."""
    calls: list[Any] = []

    def launch(*args: Any) -> None:
        calls.append(plain(args))

    def encode(*args: Any) -> Any:
        return ("map", *args)

    utils = SimpleNamespace(
        launch=launch, build_signature_metadata=tuple, fill_tma_descriptor=encode, fill_tma_descriptor_tiled=encode
    )
    active = SimpleNamespace(utils=utils, get_current_device=lambda: 0, get_current_stream=lambda device: STREAM)
    with ExitStack() as stack:
        for name, value in (("PyKernelArg", SimpleNamespace), ("ARG_TUPLE", 0), ("ARG_KERNEL", 1), ("ARG_CONSTEXPR", 2),
                            ("make_launcher", mock.Mock()), ("library_dirs", list), ("compile_module_from_src",
                            mock.Mock(return_value=utils))):  # fmt: skip
            stack.enter_context(mock.patch.object(nvidia, name, value, create=True))
        current = mock.Mock(return_value=STREAM)
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", current, create=True))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", return_value=0))
        stack.enter_context(mock.patch.object(driver, "_active", active))
        stack.enter_context(mock.patch.object(CompiledKernel, "_init_handles"))
        yield calls


def plain(x: Any) -> Any:
    """Sequences as tuples; what only a profiler's hooks would read as None."""
    if isinstance(x, LazyDict) or getattr(x, "calls", None) == []:
        return None
    return tuple(map(plain, x)) if isinstance(x, (list, tuple)) else x


def compiled(signature: dict[str, str], descriptors: int = 0, **more: Any) -> Any:
    """A compiled kernel as Triton holds it, without a GPU's module behind it."""
    target = SimpleNamespace(backend="cuda", arch=90, warp_size=32)
    metadata = SimpleNamespace(
        target=target, tensordesc_meta=[META] * descriptors, num_ctas=1, global_scratch_size=0, global_scratch_align=1,
        profile_scratch_size=0, profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=False,
        instrumentation_mode="", **more,
    )  # fmt: skip
    source = SimpleNamespace(signature=signature, constants={}, fn=SimpleNamespace(arg_names=list(signature)))
    kernel = CompiledKernel.__new__(CompiledKernel)
    kernel.name, kernel.metadata, kernel.src = "kernel", metadata, source
    kernel.function, kernel.packed_metadata = FUNCTION, (4, 1, 1024)
    kernel.module, kernel._run = None, nvidia.CudaLauncher(source, metadata)
    return kernel


def test_a_kernel_of_pointers(launched: list[Any]) -> None:
    kernel = compiled({"x": "*fp32", "n": "i32", "scale": "fp32", "F": "constexpr"})
    args = (4096, 5, 0.5, ("a", "constexpr"))
    run = plan._runner(kernel, (3, 2, 1))
    run(*args)
    kernel[3, 2, 1](*args)
    assert run.__name__ == "direct"
    assert launched[0] == launched[1]


def test_a_kernel_of_descriptors(launched: list[Any]) -> None:
    x = torch.zeros(1, 2, 70, 64, dtype=torch.bfloat16)
    y = torch.zeros(1, 70, 2, 64, dtype=torch.bfloat16).transpose(1, 2)
    tiles = [hopper_plan.tiles(t, 64, 64) for t in (x, y)]
    launch = hopper_plan.Launch(None, 5, tiles, (5, 0.5), (("a", "constexpr"),))
    kernel = compiled({"a": DESCRIPTOR, "b": DESCRIPTOR, "p": "*fp32", "n": "i32", "s": "fp32", "F": "constexpr"}, 2)
    run = hopper_plan._runner(kernel, launch)
    at = x.data_ptr(), y.data_ptr()
    for call in (lambda: run([x, y], [4096]), lambda: run([x, y], (4096,), at)):
        call()
    kernel[5, 1, 1](*[t.of(z) for t, z in zip(tiles, (x, y), strict=True)], 4096, *launch.numbers, *launch.constants)
    assert run.__name__ == "direct"
    assert launched[0] == launched[1] == launched[2]


def test_hooks_see_launches(launched: list[Any]) -> None:
    kernel = compiled({"x": "*fp32", "n": "i32"})
    run = plan._runner(kernel, (1, 1, 1))
    seen: list[Any] = []
    hook = triton.knobs.runtime.launch_enter_hook
    with mock.patch.object(kernel, "launch_metadata", return_value="metadata"):
        hook.add(seen.append)
        try:
            run(4096, 5)
        finally:
            hook.remove(seen.append)
        run(4096, 5)
    assert "metadata" in launched[0]
    assert "metadata" not in launched[1]


def test_what_needs_more_goes_through_triton() -> None:
    for change in ({"global_scratch_size": 8}, {"profile_scratch_size": 8}, {"gsan_enabled": True}):
        launcher = SimpleNamespace(**{"global_scratch_size": 0, "profile_scratch_size": 0, **change})
        metadata = SimpleNamespace(target=SimpleNamespace(backend="cuda"))
        assert plan.direct_launch(SimpleNamespace(run=launcher, metadata=metadata)) is None
    metadata = SimpleNamespace(target=SimpleNamespace(backend="hip"))
    assert plan.direct_launch(SimpleNamespace(run=None, metadata=metadata)) is None
