// A kernel without a race in which compute-sanitizer's racecheck (of CUDA 13.0, on an H200) reports one: two warps meet at a named
// barrier, the others do not; then one of the two writes, all warps meet, and one of the others reads. Without the named barrier it
// reports nothing. sanitize.py asks it anew, before it believes that a report about such barriers is another of this kind.
#include <cstdio>

template <bool kNamed>
__global__ void meet(int* out) {
  __shared__ int written[32];
  if (kNamed && threadIdx.x < 64) asm volatile("bar.sync 1, 64;" ::: "memory");
  if (threadIdx.x < 32) written[threadIdx.x] = threadIdx.x;
  __syncthreads();
  if (threadIdx.x >= 96) out[threadIdx.x - 96] = written[threadIdx.x - 96];
}

int main(int count, char**) {
  int* out;
  cudaMalloc(&out, 128);
  for (int i = 0; i < 20; ++i) count > 1 ? meet<true><<<8, 128>>>(out) : meet<false><<<8, 128>>>(out);
  const cudaError_t error = cudaDeviceSynchronize();
  printf("%s\n", cudaGetErrorString(error));
  return error != cudaSuccess;
}
