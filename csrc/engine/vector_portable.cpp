namespace {
constexpr int kRegister = 16;
}
#include "engine/vector_loops.h"
#include "kernels/isa.h"

namespace mixbits {

extern const VectorLoops kVectorLoopsAvx2;  // vector_avx2.cpp

const VectorLoops& vector_loops() {
#if defined(__x86_64__)
  static const bool wide = usable(Isa::avx2);
  return wide ? kVectorLoopsAvx2 : kLoops;
#else
  return kLoops;
#endif
}

}  // namespace mixbits
