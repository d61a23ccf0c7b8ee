namespace {
constexpr int kRegister = 32;
}
#include "engine/vector_loops.h"

namespace mixbits {

extern const VectorLoops kVectorLoopsAvx2;
const VectorLoops kVectorLoopsAvx2 = kLoops;

}  // namespace mixbits
