"""The block emulator itself: what it computes, and that it reports each planted fault (faults.cu)."""
from __future__ import annotations

import ctypes
import itertools
import json
import shutil
import subprocess

import pytest
import torch

from gpuless.cuda import emulated

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

# What must be reported.
REPORTED = {
    "divergent_barrier": r"divergent barrier: threads 0-31 wait in __syncthreads at faults.cu:\d+; "
                         r"threads 32-127 wait in __syncthreads at faults.cu:\d+",
    "early_return": r"deadlock: threads 0-95 wait in __syncthreads at faults.cu:\d+; threads 96-127 ended",
    "deadlock": r"deadlock: threads 0-63 ended; threads 64-127 wait in barrier.sync at faults.cu:\d+",
    "wrong_mask": r"thread \(\d+, 0, 0\): __shfl_xor_sync is called by lane \d+, which its mask leaves out, at ",
    "lane_outside_mask": r"lane 8 shuffles from lane 16, which is not in the mask, at faults.cu:\d+",
    "lane_missing": r"thread \d+ ended, but __shfl_sync at faults.cu:\d+ names it in its mask",
    "shared_overrun": r"thread \(127, 0, 0\): index 128 is out of the array's bounds at faults.cu:\d+",
    "misaligned_vector": r"misaligned access: address \d+ \(mod 4096\) is no multiple of 16 at faults.cu:\d+",
}
# What shows in the numbers, whatever the order.
WRONG = ("missing_barrier", "early_overwrite", "unawaited_copy", "unshared_copy", "missing_warp_sync",
         "uninitialised_shared")
OVERRUNS = ("shared_overrun_by_pointer", "dynamic_overrun", "global_overrun")
RACES = ("missing_barrier", "early_overwrite", "unawaited_copy", "unshared_copy", "missing_warp_sync")


@pytest.fixture(params=emulated.ORDERS)
def faults(request):
    module = emulated.load("emulated_faults")
    module.set_order(emulated.ORDERS.index(request.param), 1)
    yield module
    module.set_order(0, 1)


def test_every_planted_fault_is_expected_somewhere(faults):
    assert set(faults.names()) == {*REPORTED, *WRONG, *OVERRUNS}


@pytest.mark.parametrize("name", REPORTED)
def test_faults_are_reported(faults, name):
    faults.run(name, False)
    with pytest.raises(RuntimeError, match=rf"^faults::{name} in block \(0, 0, 0\).*{REPORTED[name]}"):
        faults.run(name, True)
    faults.run(name, False)         # a report leaves nothing behind


@pytest.mark.parametrize("name", WRONG)
def test_faults_show_in_the_numbers(faults, name):
    assert faults.run(name, True) != faults.run(name, False)


EACH = """
import json, os, sys, tempfile
sys.path.insert(0, sys.argv[1])
from gpuless.cuda import emulated
module = emulated.load("emulated_faults")
results = {}
for name in sys.argv[2:]:
    for fault in (False, True):
        with tempfile.TemporaryFile("w+") as log:
            child = os.fork()
            if not child:
                os.dup2(log.fileno(), 2)
                module.run(name, fault)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            log.seek(0)
            results[f"{name} {fault}"] = (status, log.read())
print(json.dumps(results))
"""


@pytest.mark.parametrize(("variant", "names", "text"), [
    ("address", OVERRUNS, "AddressSanitizer: "), ("thread", RACES, "ThreadSanitizer: data race"),
])
def test_sanitizers_name_the_line(variant, names, text):
    """Each fault in a process of its own; without the fault the same kernel is clean."""
    emulated.build("emulated_faults", variant)
    done = emulated.sanitized(variant, ["-c", EACH, str(emulated.ROOT / "tests"), *names])
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for name in names:
        assert results[f"{name} False"] == [0, ""], results[f"{name} False"][1]
        status, report = results[f"{name} True"]
        assert status != 0 and text in report and f"faults::{name}" in report and "faults.cu:" in report, report


def test_shuffles_and_votes(faults):
    values = [(7 * i + 3) % 50 + 1 for i in range(64)]
    got = faults.call_warps(values)
    for t in range(64):
        warp, lane = t // 32 * 32, t % 32
        v = lambda i, warp=warp: values[warp + i]
        ballot = sum(1 << i for i in range(32) if v(i) % 3 == 0)
        expected = [
            v(5), v(lane // 8 * 8 + (t + 3) % 8), v(lane ^ 6),
            v(lane ^ 12 if (lane ^ 12) < lane // 8 * 8 + 8 else lane),
            v(lane - 3 if lane >= 3 else lane), v(lane + 3 if lane % 16 < 13 else lane),
            ballot - (1 << 32 if ballot >> 31 else 0), int(any(v(i) == 7 for i in range(32))), 1,
            v(31 if lane % 2 else 30),
        ]
        assert got[10 * t : 10 * t + 10] == expected, t


def test_atomics(faults):
    counts, total = faults.count(3, 100)
    assert counts == [102, 99, 99, 99] and total == 300


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_as_torch_does(faults, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    wide = torch.empty(2**16)
    faults.widen(bits.data_ptr(), wide.data_ptr(), wide.numel(), dtype == torch.bfloat16)
    exact = bits.view(dtype).float()
    assert torch.equal(wide.view(torch.int32)[~exact.isnan()], exact.view(torch.int32)[~exact.isnan()])
    assert torch.equal(wide.isnan(), exact.isnan())

    halfway = exact[exact.isfinite()].double().sort().values.unique()
    around = torch.cat([halfway, (halfway[1:] + halfway[:-1]) / 2]).float()
    everywhere = torch.randint(-(2**31), 2**31 - 1, (400_000,), generator=torch.Generator().manual_seed(1)).int()
    x = torch.cat([around, around.nextafter(torch.tensor(torch.inf)), around.nextafter(torch.tensor(-torch.inf)),
                   everywhere.view(torch.float32)])
    narrow = torch.empty(x.numel(), dtype=torch.int16)
    faults.narrow(x.data_ptr(), narrow.data_ptr(), x.numel(), dtype == torch.bfloat16)
    expected, number = x.to(dtype), ~x.isnan()
    assert torch.equal(narrow[number], expected.view(torch.int16)[number])
    assert narrow.view(dtype)[~number].isnan().all()


def products(multiply, device):
    """Every layout and both types against a product in float64."""
    for dtype, transposed in itertools.product((torch.bfloat16, torch.float16), (False, True)):
        a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(2)).to(device, dtype)
        d = torch.full((16, 16), torch.nan, device=device)
        assert multiply(a.data_ptr(), b.data_ptr(), d.data_ptr(), dtype == torch.bfloat16, transposed) == 0
        expected = a.double() @ (b if transposed else b.T).double()
        torch.testing.assert_close(d.double(), expected, rtol=1e-6, atol=4e-6)


def test_tensor_cores(faults):
    products(faults.multiply, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or shutil.which("nvcc") is None, reason="needs a GPU and nvcc")
def test_fragments_on_a_device(tmp_path):
    """The same source, compiled by nvcc: the device's fragments are where the emulator's table has them."""
    library = tmp_path / "fragments.so"
    command = ["nvcc", "-std=c++17", "-arch=native", "-shared", "-Xcompiler", "-fPIC",
               f"-I{emulated.ROOT / 'csrc' / 'cuda'}", "-o", library, emulated.HERE / "fragments.cu"]
    subprocess.run(command, check=True, capture_output=True)
    multiply = ctypes.CDLL(str(library)).multiply_fragments
    multiply.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_bool] * 2
    products(multiply, "cuda")
