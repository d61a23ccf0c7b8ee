#include "kernels/registry.h"

#include <algorithm>
#include <cstring>

#include "kernels/ceiling.h"

namespace mixbits {
namespace {

std::vector<const Kernel*>& unsorted() {
  static std::vector<const Kernel*> kernels;
  return kernels;
}

std::vector<const Ceiling*>& ceilings() {
  static std::vector<const Ceiling*> known;
  return known;
}

}  // namespace

RegisteredCeiling::RegisteredCeiling(const Ceiling& ceiling) { ceilings().push_back(&ceiling); }

const std::vector<const Ceiling*>& all_ceilings() { return ceilings(); }

Registered::Registered(const Kernel& kernel) { unsorted().push_back(&kernel); }

const std::vector<const Kernel*>& all_kernels() {
  static const std::vector<const Kernel*> sorted = [] {
    std::vector<const Kernel*> kernels = unsorted();
    std::sort(kernels.begin(), kernels.end(),
              [](const Kernel* a, const Kernel* b) { return std::strcmp(a->name, b->name) < 0; });
    return kernels;
  }();
  return sorted;
}

const Kernel* kernel_named(const char* name) {
  for (const Kernel* kernel : all_kernels()) {
    if (std::strcmp(kernel->name, name) == 0) return kernel;
  }
  return nullptr;
}

}  // namespace mixbits
