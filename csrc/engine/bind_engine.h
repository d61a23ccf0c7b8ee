#pragma once

#include <nanobind/nanobind.h>

namespace mixbits {

void bind_engine(nanobind::module_& module);

}  // namespace mixbits
