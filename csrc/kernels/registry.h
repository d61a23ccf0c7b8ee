// All kernels of this build.
#pragma once

#include <vector>

#include "kernels/kernel.h"

namespace mixbits {

// Every kernel that was compiled, in the order of their names, usable here or not.
const std::vector<const Kernel*>& all_kernels();

// Null if there is none of that name.
const Kernel* kernel_named(const char* name);

}  // namespace mixbits
