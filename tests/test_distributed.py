"""Where a process runs: device, number format, rank among how many."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simcot_latent.distributed import Ranks, autocast, pick_device, pick_dtype, ranks_on
from simcot_latent.errors import UserError

CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# --- devices and number formats --------------------------------------------------------------------------------------


def test_cpu_is_always_there() -> None:
    assert pick_device("cpu") == CPU


@no_gpu
def test_auto_without_a_gpu() -> None:
    assert pick_device("auto") == CPU


@pytest.mark.slow
@needs_gpu
def test_auto_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 0)
    assert pick_device("cuda:0") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(UserError, match="CUDA devices"):
        pick_device("cuda")


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match=f"device={name}: this machine has 0 CUDA devices; use device=cpu"):
        pick_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "CPU ", "meta", "xla", "cpu:1:2"])
def test_what_is_no_device(name: str) -> None:
    with pytest.raises(UserError, match=r"device=.*must be auto, cpu, cuda, cuda:N or mps"):
        pick_device(name)


def test_mps_is_there_or_refused() -> None:
    if torch.backends.mps.is_available():
        assert pick_device("mps").type == "mps"
    else:
        with pytest.raises(UserError, match="device=mps"):
            pick_device("mps")


WIDE = 256


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_number_format_that_is_named_is_taken(device: str) -> None:
    assert pick_dtype("float32", torch.device(device), WIDE) == torch.float32
    assert pick_dtype("bfloat16", torch.device(device), WIDE) == torch.bfloat16


def test_the_number_format_of_a_mac() -> None:
    assert pick_dtype("auto", torch.device("mps"), WIDE) == torch.float32


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="processors are described in Linux's /proc")
def test_the_number_format_of_this_cpu() -> None:
    """By what the kernel says of it."""
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    has_bfloat16 = bool({"amx_bf16", "avx512_bf16"} & set(flags)) and hasattr(torch.cpu, "get_capabilities")
    assert pick_dtype("auto", CPU, WIDE) == (torch.bfloat16 if has_bfloat16 else torch.float32)


@pytest.mark.parametrize("has_it", [True, False])
def test_the_number_format_of_a_gpu(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 where the GPU itself has it; emulated it would only be slow."""

    def supported(including_emulation: bool = True) -> bool:
        return has_it or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    for width in (WIDE, WIDE - 1):
        assert pick_dtype("auto", torch.device("cuda"), width) == (torch.bfloat16 if has_it else torch.float32)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_bfloat16_on_cpus_that_have_it_in_hardware(
    flags: dict[str, bool], wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("this torch does not tell")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert pick_dtype("auto", CPU, WIDE) == wanted
    assert pick_dtype("auto", CPU, WIDE - 1) == torch.float32, "narrow models gain nothing"


def test_autocast_computes_in_the_format_and_keeps_weights() -> None:
    layer = torch.nn.Linear(4, 4)
    with autocast(CPU, torch.bfloat16):
        assert layer(torch.zeros(1, 4)).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert layer(torch.zeros(1, 4)).dtype == torch.float32
    assert layer.weight.dtype == torch.float32


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with ranks_on(CPU) as ranks:
        assert ranks == Ranks(0, 1)
        assert ranks.is_main
        values = {"a": torch.tensor(1.5)}
        assert ranks.sum(values) == values
        assert ranks.from_main("here") == "here"
        ranks.barrier()
    assert not torch.distributed.is_initialized()


THREE_RANKS = """
import torch
from simcot_latent.distributed import ranks_on

with ranks_on(torch.device("cpu")) as ranks:
    assert ranks.world == 3 and ranks.is_main == (ranks.rank == 0)
    before = {"a": torch.tensor(float(ranks.rank)), "b": torch.full((2, 3), 10.0 ** ranks.rank), "none": torch.zeros(0)}
    after = ranks.sum(before)
    assert after["a"].item() == 0 + 1 + 2 and after["a"].shape == ()
    assert after["b"].tolist() == [[111.0] * 3] * 2
    assert after["none"].shape == (0,)
    assert before["a"].item() == ranks.rank, "the input is left alone"
    assert ranks.sum({}) == {}
    assert ranks.from_main({"folder": f"run-{ranks.rank}"}) == {"folder": "run-0"}
    ranks.barrier()
assert not torch.distributed.is_initialized()
print("done", ranks.rank)
"""


def test_three_processes(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
    repository = str(Path(__file__).parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", THREE_RANKS],
            cwd=tmp_path,
            env={**os.environ, **shared, "RANK": str(rank), "PYTHONPATH": repository},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    for rank, process in enumerate(processes):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out == f"done {rank}\n"
