// Programmatic dependent launch: in a custom call of several launches (ffi_kernels/chain.py) a kernel starts while the one before
// it still runs, and meanwhile may read what no launch writes, its weights above all. Every kernel calls both functions, in every
// thread: a kernel that has ended must mean that all those before it have.
#pragma once

#include "numerics.h"

namespace dsv4 {

// The next kernel may start: it takes what the multiprocessors have left.
DSV4_D void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Before anything is read that another launch may have written, and before anything is written.
DSV4_D void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// For kernels that have nothing to do in advance.
DSV4_D void start_after_previous() {
  let_next_start();
  wait_for_previous();
}

}  // namespace dsv4
