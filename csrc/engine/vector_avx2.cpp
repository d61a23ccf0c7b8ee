namespace {
constexpr int kWidth = 8;
}
#include "engine/vector_loops.h"

namespace mixbits {

extern const VectorLoops kVectorLoopsAvx2;
const VectorLoops kVectorLoopsAvx2 = kLoops;

}  // namespace mixbits
