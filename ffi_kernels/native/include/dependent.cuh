// Programmatic dependent launch: in a custom call of several launches (ffi_kernels/chain.py) a kernel starts while the one before
// it still runs, and meanwhile may read what no launch writes, its weights above all, and the inputs that its launch calls early
// (ffi_kernels/launch.py). Every thread waits: a kernel that has ended must mean that all those before it have. And one thread of
// each CTA at least lets the next kernel start.
#pragma once

#include "numerics.h"

namespace dsv4 {

// The next kernel may start: it takes what the multiprocessors have left.
DSV4_D void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Before anything is read that another launch may have written, and before anything is written.
DSV4_D void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The same, and the next kernel may start afterwards: what was written before this launch is then there for it without a wait.
DSV4_D void wait_and_let_next_start() {
  wait_for_previous();
  let_next_start();
}

// Brings the kernel's parameters nearer, by one warp: what is not looked at before the wait would be fetched after it.
template <class Params>
DSV4_D void touch_params(const Params& p) {
  if (warp_id() != 1) return;
  const int* words = reinterpret_cast<const int*>(&p);
  int all = 0;
#pragma unroll 1
  for (int i = 0; i < int(sizeof(Params) / 64); ++i) all |= words[16 * i];
  asm volatile("" ::"r"(all));
}

// A kernel of few instructions waits for its own code longer than for anything else: whatever ran before has driven it out of the
// instruction caches. It may go through it twice, the first time before the wait, without inputs and without storing:
// `for (int pass = kRehearsal; pass <= kReal; ++pass)`, not unrolled. Of the small kernels of a step, `queries` gained by it (0.8 us of
// 3.9 us), route_scores and the latent rows did not, and the products lost.
enum Pass : int { kRehearsal = 0, kReal = 1 };

// For kernels that have nothing to do in advance.
DSV4_D void start_after_previous() {
  let_next_start();
  wait_for_previous();
}

}  // namespace dsv4
