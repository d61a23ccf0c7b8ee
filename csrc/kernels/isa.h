// Instruction sets that kernels are written for, and which of them this CPU has.
#pragma once

#include <cstdint>

namespace mixbits {

// A kernel's file is called family_SUFFIX.cpp, and CMakeLists.txt gives it the flags of its suffix.
enum class Isa : std::uint8_t {
  portable,      // C++ alone
  avx2,          // AVX2 and FMA
  avx512,        // AVX-512 F, BW, VL, DQ
  avx512vnni,    // and VNNI
  avx512popcnt,  // and VPOPCNTDQ, BITALG
  avx512vbmi,    // and VBMI
  neon,          // AArch64 with Advanced SIMD
  neondot,       // and the dot product instructions
};

// Name as in file suffixes and in MIXBITS_ISA.
const char* name_of(Isa isa);

// Whether this CPU has it, and MIXBITS_ISA does not forbid it. That variable names the highest level to use:
// portable, avx2, avx512 (no extension), avx512vnni, avx512popcnt or avx512vbmi (that extension alone beside
// avx512), neon, neondot, or native (the default: all there is).
bool usable(Isa isa);

// Null, or what is wrong with MIXBITS_ISA.
const char* isa_problem();

// The CPU's model name, which keys measured choices.
const char* cpu_model();

}  // namespace mixbits
