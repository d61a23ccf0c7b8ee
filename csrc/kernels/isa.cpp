#include "kernels/isa.h"

#include <array>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace mixbits {
namespace {

constexpr std::array kAll = {Isa::portable,     Isa::avx2,       Isa::avx512, Isa::avx512vnni,
                             Isa::avx512popcnt, Isa::avx512vbmi, Isa::neon,   Isa::neondot};

bool cpu_has(Isa isa) {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::portable: return true;
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512: return avx512;
    case Isa::avx512vnni: return avx512 && __builtin_cpu_supports("avx512vnni");
    case Isa::avx512popcnt:
      return avx512 && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bitalg");
    case Isa::avx512vbmi: return avx512 && __builtin_cpu_supports("avx512vbmi");
    default: return false;
  }
#elif defined(__aarch64__)
  switch (isa) {
    case Isa::portable:
    case Isa::neon: return true;
#if defined(__linux__)
    case Isa::neondot: return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
    default: return false;
  }
#else
  return isa == Isa::portable;
#endif
}

const char* wanted() {
  const char* value = std::getenv("MIXBITS_ISA");
  return value == nullptr || *value == '\0' ? "native" : value;
}

// The levels that a named one contains.
bool allowed(const char* name, Isa isa) {
  if (std::strcmp(name, "native") == 0 || isa == Isa::portable || std::strcmp(name, name_of(isa)) == 0) {
    return true;
  }
  const bool in_avx512 = std::strncmp(name, "avx512", 6) == 0;
  return (isa == Isa::avx2 && in_avx512) || (isa == Isa::avx512 && in_avx512) ||
         (isa == Isa::neon && std::strcmp(name, "neondot") == 0);
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512vnni: return "avx512vnni";
    case Isa::avx512popcnt: return "avx512popcnt";
    case Isa::avx512vbmi: return "avx512vbmi";
    case Isa::neon: return "neon";
    case Isa::neondot: return "neondot";
  }
  return "portable";
}

bool usable(Isa isa) { return cpu_has(isa) && allowed(wanted(), isa); }

const char* isa_problem() {
  const char* name = wanted();
  if (std::strcmp(name, "native") == 0) return nullptr;
  for (const Isa isa : kAll) {
    if (std::strcmp(name, name_of(isa)) != 0) continue;
    return cpu_has(isa) ? nullptr : "this CPU does not have it";
  }
  return "it names no level: portable, avx2, avx512, avx512vnni, avx512popcnt, avx512vbmi, neon, neondot, "
         "native";
}

const char* cpu_model() {
  static const std::string model = [] {
    std::ifstream info("/proc/cpuinfo");
    for (std::string line; std::getline(info, line);) {
      if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
    }
    return std::string("unknown");
  }();
  return model.c_str();
}

}  // namespace mixbits
