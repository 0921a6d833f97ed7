"""The reader of cubins finds what is in them: kernels written in PTX for what each of them holds."""
from __future__ import annotations

import subprocess

import pytest

from gpuless import cubin

try:
    for name in ("ptxas", "cuobjdump"):
        cubin.tool(name)
except FileNotFoundError as missing:
    pytest.skip(f"{missing}: `make gpuless` brings them", allow_module_level=True)

WIDE_COPY = """
.visible .entry copy(.param .u64 to, .param .u64 from) {
  .reg .b64 %t, %f; .reg .f32 %x<4>;
  ld.param.u64 %t, [to]; ld.param.u64 %f, [from];
  ld.global.v4.f32 {%x0, %x1, %x2, %x3}, [%f];
  ex2.approx.f32 %x0, %x0;
  fma.rn.f32 %x1, %x1, %x2, %x3;
  st.global.v4.f32 [%t], {%x0, %x1, %x2, %x3};
  st.global.f32 [%t+16], %x1;
  ret;
}"""
LOCAL_ARRAY = """
.visible .entry spills(.param .u64 to, .param .u64 at) {
  .reg .b64 %t, %i, %p; .reg .f32 %x;
  .local .align 16 .b8 array[64];
  ld.param.u64 %t, [to]; ld.param.u64 %i, [at];
  mov.u64 %p, array; add.u64 %p, %p, %i;
  mov.f32 %x, 0f3F800000;
  st.local.f32 [%p], %x;
  ld.local.f32 %x, [%p+4];
  st.global.f32 [%t], %x;
  ret;
}"""
SHARED = """
.visible .entry shares(.param .u64 to) {
  .reg .b64 %t; .reg .b32 %x;
  .shared .align 4 .b8 buffer[512];
  ld.param.u64 %t, [to]; mov.u32 %x, %tid.x;
  st.shared.u32 [buffer], %x; bar.sync 0; ld.shared.u32 %x, [buffer+4];
  atom.global.exch.b32 %x, [%t], %x;
  shfl.sync.bfly.b32 %x, %x, 1, 31, -1;
  st.global.u32 [%t], %x;
  ret;
}"""

LOOP = """
.visible .entry walks(.param .u64 to, .param .u32 n) {
  .reg .b64 %t; .reg .b32 %i, %n; .reg .pred %p;
  ld.param.u64 %t, [to]; ld.param.u32 %n, [n]; mov.u32 %i, 0;
again:
  atom.global.exch.b32 %i, [%t], %i; add.u32 %i, %i, 3;
  setp.lt.u32 %p, %i, %n;
  @%p bra again;
  st.global.u32 [%t], %i;
  ret;
}"""


def assemble(ptx: str, folder, arch: str) -> bytes:
    source, target = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(f".version 8.7\n.target {arch}\n.address_size 64\n{ptx}\n")
    subprocess.run([cubin.tool("ptxas"), f"-arch={arch}", "-o", target, source], check=True, capture_output=True)
    return target.read_bytes()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a", "sm_120"])
def test_kernels_hold_what_was_written(arch, tmp_path):
    kernels = cubin.read(assemble(WIDE_COPY + LOCAL_ARRAY + SHARED, tmp_path, arch))
    assert set(kernels) == {"copy", "spills", "shares"}
    assert {k.arch for k in kernels.values()} == {arch}
    copy, spills, shares = (kernels[name] for name in ("copy", "spills", "shares"))
    assert {name: copy.counts[name] for name in ("load", "wide_load", "store", "wide_store", "special", "fma")} == {
        "load": 1, "wide_load": 1, "store": 2, "wide_store": 1, "special": 1, "fma": 1,
    }
    assert copy.spill_bytes == 0 and copy.shared == 0 and 0 < copy.registers < 32
    assert spills.spill_bytes == 8 and spills.stack >= 64
    assert shares.shared == 512
    assert {name: shares.counts[name] for name in ("shared_load", "shared_store", "barrier", "shuffle", "atomic")} == {
        "shared_load": 1, "shared_store": 1, "barrier": 1, "shuffle": 1, "atomic": 1,
    }
    assert copy.record()["special"] == 1 and "matrix" not in copy.record()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a", "sm_120"])
def test_the_longest_loop_is_found(arch, tmp_path):
    walks = assemble(LOOP, tmp_path, arch)
    assert 4 <= cubin.longest_loop(cubin.sass(walks)) < cubin.read(walks)["walks"].instructions
    assert cubin.longest_loop(cubin.sass(assemble(WIDE_COPY, tmp_path, arch))) == 0


def test_a_file_that_is_no_cubin_is_refused(tmp_path):
    (tmp_path / "x.cubin").write_text("nothing")
    with pytest.raises(RuntimeError, match="cuobjdump"):
        cubin.read(tmp_path / "x.cubin")


@pytest.mark.parametrize(("arch", "registers", "shared", "threads", "expected"), [
    ("sm_80", 32, 0, 256, 1.0),                 # nothing binds
    ("sm_90a", 255, 0, 128, 8 / 64),            # 8 warps' worth of registers
    ("sm_90a", 191, 98304, 256, 8 / 64),        # registers for 8 warps, though shared memory would do for 2 blocks
    ("sm_90a", 64, 98304, 256, 16 / 64),        # shared memory for 2 blocks
    ("sm_80", 40, 0, 32, 32 / 64),              # 32 blocks of one warp
    ("sm_80", 168, 0, 96, 12 / 64),             # 12 warps of registers, 4 blocks of 3
    ("sm_120", 32, 52000, 512, 16 / 48),        # shared memory for one block beside the system's part
    ("sm_120", 32, 100 << 10, 512, 0.0),        # more than a block may have
])
def test_occupancy(arch, registers, shared, threads, expected):
    assert cubin.occupancy(arch, registers, shared, threads) == expected
