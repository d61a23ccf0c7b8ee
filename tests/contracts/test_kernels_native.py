"""Every kernel without Python: under sanitizers on this CPU, and on Arm under an emulator."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mixbits.pack.bits import native_available

if native_available():
    from mixbits import _native

ROOT = Path(__file__).parents[2]
X86 = ["portable", "avx2", "avx512", "avx512vnni", "avx512popcnt", "avx512vbmi"]
ARM = ["portable", "neon", "neondot"]
HERE = X86 if platform.machine() in ("x86_64", "AMD64") else ARM
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Layers of each kernel, of at most so many multiplications; without optimization, which takes longest to compile.
QUICK, QUICK_MACS = 60, 500_000


def flags_of_levels() -> dict[str, list[str]]:
    """Compiler flags of every suffix of a kernel's file, as CMakeLists.txt has them."""
    flags: dict[str, list[str]] = {}
    for suffix, value in re.findall(
        r"^set\(FLAGS_(\w+) (.*)\)$", (ROOT / "CMakeLists.txt").read_text(), re.M
    ):
        flags[suffix] = re.sub(r"\$\{FLAGS_(\w+)\}", lambda m: " ".join(flags[m[1]]), value).split()
    return flags


def built(folder: Path, compiler: str, levels: list[str], *options: str) -> Path:
    """The program of tests/native/kernels.cpp with the kernels of these levels; two files are compiled at a time."""
    flags = {"portable": [], **flags_of_levels()}
    sources = [ROOT / "tests/native/kernels.cpp", *(ROOT / "csrc/kernels").glob("*.cpp")]
    commands: dict[Path, list[str | Path]] = {}  # by object file
    command = [compiler, "-std=c++20", "-fwrapv", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", *options]
    for source in sources:
        suffix = source.stem.rpartition("_")[2] if "_" in source.stem else "portable"
        if suffix not in levels or source.stem.startswith("ceiling_"):  # those are no kernels
            continue
        to = folder / f"{source.parent.name}_{source.stem}.o"
        commands[to] = [*command, *flags[suffix], "-c", source, "-o", to]
    with ThreadPoolExecutor(2) as pool:
        for finished in pool.map(lambda one: subprocess.run(one, check=False), commands.values()):
            finished.check_returncode()
    program = folder / "kernels"
    subprocess.run([*command, *commands, "-o", program], check=True)
    return program


def assert_clean(program: Path, layers: int, *more: int) -> None:
    """Every kernel that this CPU can run computed so many layers, rightly and without a word of a sanitizer."""
    command = [program, str(layers), "1", *map(str, more)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    usable = {name for name, can_run, _ in _native.kernels() if can_run} - {"direct_portable"}
    assert usable <= {line.split()[0] for line in result.stdout.splitlines()}


@pytest.mark.skipif(not native_available(), reason="built without the native extension")
def test_kernels_neither_read_nor_write_where_they_may_not(tmp_path: Path):
    assert_clean(built(tmp_path, "c++", HERE, "-O0", *SANITIZERS), QUICK, QUICK_MACS)


@pytest.mark.slow
@pytest.mark.skipif(not native_available(), reason="built without the native extension")
def test_kernels_as_compilers_optimize_them_are_clean_on_large_layers(tmp_path: Path):
    assert_clean(built(tmp_path, "c++", HERE, "-O1", "-g", *SANITIZERS), 200)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)
def test_kernels_for_arm_give_the_same_sums(tmp_path: Path):
    program = built(tmp_path, "aarch64-linux-gnu-g++", ARM, "-O3", "-static")
    result = subprocess.run(["qemu-aarch64", program, "150"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "_neon" in result.stdout
