// Launches that may start before the one ahead of them has ended: what they touch before griddepcontrol.wait, for test_chain.py.
#include <cstdint>

struct Params {
  const int32_t* weights;  // that no launch writes
  const int32_t* x;        // that the launch before writes
  int32_t* out;
  int32_t mistake;
};

#define WAIT() asm volatile("griddepcontrol.wait;" ::: "memory")

extern "C" __global__ void add(const __grid_constant__ Params p) {
  const int i = threadIdx.x;
  asm volatile("griddepcontrol.launch_dependents;");
  int early = 0;
  if (p.mistake == 1) early = p.x[i];
  if (p.mistake == 2) p.out[i] = 0;
  const int weight = p.weights[i];
  if (p.mistake == 3 ? i < 16 : p.mistake != 4) WAIT();  // 3: half of the threads; 4: none
  if (p.mistake == 4) return;
  p.out[i] = weight + p.x[i] + (early & 0x40000000);
}
