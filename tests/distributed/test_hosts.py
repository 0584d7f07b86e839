"""Two machines, as far as one can play them: network namespaces with an address each, one launcher in either."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from steplm.config import RunConfig, dump_config
from steplm.training import run as run_module

OVERRIDES = ("train.per_device_train_batch_size=1", "train.global_batch_size=4", "train.save_steps=2")
ADDRESSES = ("10.213.0.1", "10.213.0.2")


def _ip(arguments: str, *, check: bool = True) -> int:
    return subprocess.run(["ip", *arguments.split()], check=check, capture_output=True).returncode


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces that reach each other, and nothing else."""
    first, second = names = f"steplm-{os.getpid()}-0", f"steplm-{os.getpid()}-1"
    if not shutil.which("ip") or _ip(f"netns add {first}", check=False):
        pytest.skip("network namespaces need Linux, iproute2 and root")
    try:
        _ip(f"netns add {second}")
        _ip(f"link add host0 netns {first} type veth peer name host0 netns {second}")
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip(f"-n {name} address add {address}/24 dev host0")
            _ip(f"-n {name} link set lo up")
            _ip(f"-n {name} link set host0 up")
        yield names
    finally:
        for name in names:
            _ip(f"netns delete {name}", check=False)


def test_two_hosts_train_as_one_process_does(
    hosts: tuple[str, str],
    tiny_run: Callable[..., RunConfig],
    trained: Callable[..., Path],
    tmp_path: Path,
    assert_same_losses: Callable[..., None],
) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(dump_config(tiny_run(tmp_path / "two", *OVERRIDES)))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "host0",
        "PYTHONPATH": str(Path(run_module.__file__).parents[2]),
    }
    meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=steplm")
    launchers = []
    for name, address in zip(hosts, ADDRESSES, strict=True):
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *meeting)
        is_host = f"--rdzv-conf=is_host={address == ADDRESSES[0]}"
        command = ["ip", "netns", "exec", name, *torchrun, is_host, f"--local-addr={address}"]
        command += ["-m", "steplm", "train", str(run_file)]
        log = (tmp_path / f"{name}.log").open("w")
        launchers.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT))
        log.close()
    try:
        codes = [launcher.wait(timeout=120) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert codes == [0, 0], "\n".join((tmp_path / f"{name}.log").read_text()[-3000:] for name in hosts)
    assert_same_losses(tmp_path / "two", trained(*OVERRIDES))
