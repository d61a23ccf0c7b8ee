"""Every kernel without Python: under sanitizers on this CPU, and on Arm under an emulator."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mixbits.pack.bits import native_available

ROOT = Path(__file__).parents[2]
X86 = ["portable", "avx2", "avx512", "avx512vnni", "avx512popcnt", "avx512vbmi"]
ARM = ["portable", "neon", "neondot"]
HERE = X86 if platform.machine() in ("x86_64", "AMD64") else ARM
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def flags_of_levels() -> dict[str, list[str]]:
    """Compiler flags of every suffix of a kernel's file, as CMakeLists.txt has them."""
    flags: dict[str, list[str]] = {}
    for suffix, value in re.findall(
        r"^set\(FLAGS_(\w+) (.*)\)$", (ROOT / "CMakeLists.txt").read_text(), re.M
    ):
        flags[suffix] = re.sub(r"\$\{FLAGS_(\w+)\}", lambda m: " ".join(flags[m[1]]), value).split()
    return flags


def built(folder: Path, compiler: str, levels: list[str], *options: str) -> Path:
    """The program of tests/native/kernels.cpp with the kernels of these levels."""
    flags = {"portable": [], **flags_of_levels()}
    sources = [ROOT / "tests/native/kernels.cpp", *(ROOT / "csrc/kernels").glob("*.cpp")]
    objects: list[Path] = []
    command = [compiler, "-std=c++20", "-fwrapv", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", *options]
    for source in sources:
        suffix = source.stem.rpartition("_")[2] if "_" in source.stem else "portable"
        if suffix not in levels:
            continue
        objects.append(folder / f"{source.parent.name}_{source.stem}.o")
        subprocess.run([*command, *flags[suffix], "-c", source, "-o", objects[-1]], check=True)
    program = folder / "kernels"
    subprocess.run([*command, *objects, "-o", program], check=True)
    return program


@pytest.mark.slow
@pytest.mark.skipif(not native_available(), reason="built without the native extension")
def test_kernels_neither_read_nor_write_where_they_may_not(tmp_path: Path):
    program = built(tmp_path, "c++", HERE, *SANITIZERS)
    result = subprocess.run([program, "1000"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)
def test_kernels_for_arm_give_the_same_sums(tmp_path: Path):
    program = built(tmp_path, "aarch64-linux-gnu-g++", ARM, "-O3", "-static")
    result = subprocess.run(["qemu-aarch64", program, "500"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "_neon" in result.stdout
