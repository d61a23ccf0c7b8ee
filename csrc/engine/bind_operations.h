// What Python can call of the engine's operations.
#pragma once

#include <nanobind/nanobind.h>

namespace mixbits {

void bind_operations(nanobind::module_& module);

}  // namespace mixbits
