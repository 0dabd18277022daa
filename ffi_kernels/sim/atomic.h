// The arithmetic of atomics, shared with bulk reductions.
#pragma once

#include "decode.h"

namespace dsv4::sim {

enum class AtomicOp : uint8_t { add, min, max, inc, dec, bit_and, bit_or, bit_xor, exch, cas };
AtomicOp atomic_op(Decode& d);
void check_atomic(Decode& d, AtomicOp op, Type t);
uint64_t apply_atomic(AtomicOp op, Type t, uint64_t old, uint64_t b, uint64_t c, bool flush_subnormals);

}  // namespace dsv4::sim
