// One kernel per conversion: out[i] = cvt(in[i]).
#include <cstdint>

#define ONE(name, Out, In, text, out_kind, in_kind)                                     \
  struct name##_params { const In* a; Out* d; int n; };                                 \
  extern "C" __global__ void name(const __grid_constant__ name##_params p) {            \
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.n; i += gridDim.x * blockDim.x) { \
      Out d;                                                                            \
      asm(text : "=" out_kind(d) : in_kind(p.a[i]));                                    \
      p.d[i] = d;                                                                       \
    }                                                                                   \
  }
#define TWO(name, Out, In, text, out_kind, in_kind)                                     \
  struct name##_params { const In* a; const In* b; Out* d; int n; };                    \
  extern "C" __global__ void name(const __grid_constant__ name##_params p) {            \
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.n; i += gridDim.x * blockDim.x) { \
      Out d;                                                                            \
      asm(text : "=" out_kind(d) : in_kind(p.a[i]), in_kind(p.b[i]));                   \
      p.d[i] = d;                                                                       \
    }                                                                                   \
  }

ONE(f32_bf16, float, uint16_t, "cvt.f32.bf16 %0, %1;", "f", "h")
ONE(f32_f16, float, uint16_t, "cvt.f32.f16 %0, %1;", "f", "h")
ONE(bf16_f32, uint16_t, float, "cvt.rn.bf16.f32 %0, %1;", "h", "f")
ONE(bf16_f32_rz, uint16_t, float, "cvt.rz.bf16.f32 %0, %1;", "h", "f")
ONE(bf16_f32_relu, uint16_t, float, "cvt.rn.relu.bf16.f32 %0, %1;", "h", "f")
ONE(f16_f32, uint16_t, float, "cvt.rn.f16.f32 %0, %1;", "h", "f")
ONE(f16_f32_rz, uint16_t, float, "cvt.rz.f16.f32 %0, %1;", "h", "f")
ONE(f16_f32_rm, uint16_t, float, "cvt.rm.f16.f32 %0, %1;", "h", "f")
ONE(f16_f32_rp, uint16_t, float, "cvt.rp.f16.f32 %0, %1;", "h", "f")
ONE(f16_f32_satfinite, uint16_t, float, "cvt.rn.satfinite.f16.f32 %0, %1;", "h", "f")
ONE(tf32_f32, uint32_t, float, "cvt.rna.tf32.f32 %0, %1;", "r", "f")
TWO(bf16x2_f32, uint32_t, float, "cvt.rn.bf16x2.f32 %0, %1, %2;", "r", "f")
TWO(f16x2_f32, uint32_t, float, "cvt.rn.f16x2.f32 %0, %1, %2;", "r", "f")
TWO(e4m3x2_f32, uint16_t, float, "cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;", "h", "f")
TWO(e5m2x2_f32, uint16_t, float, "cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;", "h", "f")
ONE(e4m3x2_f16x2, uint16_t, uint32_t, "cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;", "h", "r")
ONE(e5m2x2_f16x2, uint16_t, uint32_t, "cvt.rn.satfinite.e5m2x2.f16x2 %0, %1;", "h", "r")
ONE(f16x2_e4m3x2, uint32_t, uint16_t, "cvt.rn.f16x2.e4m3x2 %0, %1;", "r", "h")
ONE(f16x2_e5m2x2, uint32_t, uint16_t, "cvt.rn.f16x2.e5m2x2 %0, %1;", "r", "h")
ONE(s32_f32_rni, int32_t, float, "cvt.rni.s32.f32 %0, %1;", "r", "f")
ONE(s32_f32_rzi, int32_t, float, "cvt.rzi.s32.f32 %0, %1;", "r", "f")
ONE(s32_f32_rmi, int32_t, float, "cvt.rmi.s32.f32 %0, %1;", "r", "f")
ONE(s32_f32_rpi, int32_t, float, "cvt.rpi.s32.f32 %0, %1;", "r", "f")
ONE(u32_f32_rzi, uint32_t, float, "cvt.rzi.u32.f32 %0, %1;", "r", "f")
ONE(s64_f32_rzi, int64_t, float, "cvt.rzi.s64.f32 %0, %1;", "l", "f")
ONE(u64_f64_rzi, uint64_t, double, "cvt.rzi.u64.f64 %0, %1;", "l", "d")
ONE(f32_f32_rni, float, float, "cvt.rni.f32.f32 %0, %1;", "f", "f")
ONE(f32_sat, float, float, "cvt.sat.f32.f32 %0, %1;", "f", "f")
ONE(f32_s32_rn, float, int32_t, "cvt.rn.f32.s32 %0, %1;", "f", "r")
ONE(f32_s32_rz, float, int32_t, "cvt.rz.f32.s32 %0, %1;", "f", "r")
ONE(f32_u64_rn, float, uint64_t, "cvt.rn.f32.u64 %0, %1;", "f", "l")
ONE(f64_s64_rn, double, int64_t, "cvt.rn.f64.s64 %0, %1;", "d", "l")
ONE(f32_f64_rn, float, double, "cvt.rn.f32.f64 %0, %1;", "f", "d")
ONE(f32_f64_rz, float, double, "cvt.rz.f32.f64 %0, %1;", "f", "d")
ONE(f64_f32, double, float, "cvt.f64.f32 %0, %1;", "d", "f")
ONE(s8_s32, int32_t, int32_t, "cvt.s8.s32 %0, %1;", "r", "r")
ONE(u16_s32_sat, uint32_t, int32_t, "cvt.sat.u16.s32 %0, %1;", "r", "r")
ONE(s8_s32_sat, int32_t, int32_t, "cvt.sat.s8.s32 %0, %1;", "r", "r")

ONE(bf16_f16, uint16_t, uint16_t, "cvt.rn.bf16.f16 %0, %1;", "h", "h")
ONE(f16_bf16, uint16_t, uint16_t, "cvt.rn.f16.bf16 %0, %1;", "h", "h")
ONE(f64_f16, double, uint16_t, "cvt.f64.f16 %0, %1;", "d", "h")
ONE(f64_bf16, double, uint16_t, "cvt.f64.bf16 %0, %1;", "d", "h")
ONE(f16_f64, uint16_t, double, "cvt.rn.f16.f64 %0, %1;", "h", "d")
ONE(bf16_f64, uint16_t, double, "cvt.rn.bf16.f64 %0, %1;", "h", "d")
ONE(s32_f16_rni, int32_t, uint16_t, "cvt.rni.s32.f16 %0, %1;", "r", "h")
ONE(u16_f16_rzi, uint16_t, uint16_t, "cvt.rzi.u16.f16 %0, %1;", "h", "h")
ONE(s64_f16_rmi, int64_t, uint16_t, "cvt.rmi.s64.f16 %0, %1;", "l", "h")
ONE(s32_bf16_rpi, int32_t, uint16_t, "cvt.rpi.s32.bf16 %0, %1;", "r", "h")
ONE(f16_s32, uint16_t, int32_t, "cvt.rn.f16.s32 %0, %1;", "h", "r")
ONE(f16_u16_rz, uint16_t, uint16_t, "cvt.rz.f16.u16 %0, %1;", "h", "h")
ONE(f16_s64, uint16_t, int64_t, "cvt.rn.f16.s64 %0, %1;", "h", "l")
ONE(bf16_s32, uint16_t, int32_t, "cvt.rn.bf16.s32 %0, %1;", "h", "r")
ONE(bf16_u64_rz, uint16_t, uint64_t, "cvt.rz.bf16.u64 %0, %1;", "h", "l")
ONE(f32_u32_rp, float, uint32_t, "cvt.rp.f32.u32 %0, %1;", "f", "r")
ONE(f32_u32_rm, float, uint32_t, "cvt.rm.f32.u32 %0, %1;", "f", "r")
ONE(f32_s64_rz, float, int64_t, "cvt.rz.f32.s64 %0, %1;", "f", "l")
ONE(f64_u32, double, uint32_t, "cvt.rn.f64.u32 %0, %1;", "d", "r")
ONE(f64_u64_rz, double, uint64_t, "cvt.rz.f64.u64 %0, %1;", "d", "l")
ONE(f64_s64_rp, double, int64_t, "cvt.rp.f64.s64 %0, %1;", "d", "l")
ONE(f32_u8, float, uint32_t, "{ .reg .b16 t; cvt.u16.u32 t, %1; cvt.rn.f32.u8 %0, t; }", "f", "r")
ONE(f32_s8, float, uint32_t, "{ .reg .b16 t; cvt.u16.u32 t, %1; cvt.rn.f32.s8 %0, t; }", "f", "r")
ONE(f32_s16, float, uint16_t, "cvt.rn.f32.s16 %0, %1;", "f", "h")
ONE(u8_f32_rzi_sat, uint32_t, float, "cvt.rzi.sat.u8.f32 %0, %1;", "r", "f")
ONE(s8_f32_rni_sat, int32_t, float, "cvt.rni.sat.s8.f32 %0, %1;", "r", "f")
ONE(u32_f64_rni, uint32_t, double, "cvt.rni.u32.f64 %0, %1;", "r", "d")
ONE(s32_f64_rmi, int32_t, double, "cvt.rmi.s32.f64 %0, %1;", "r", "d")
ONE(u64_f32_rpi, uint64_t, float, "cvt.rpi.u64.f32 %0, %1;", "l", "f")
ONE(s32_f32_rpi_ftz, int32_t, float, "cvt.rpi.ftz.s32.f32 %0, %1;", "r", "f")
ONE(f32_rzi, float, float, "cvt.rzi.f32.f32 %0, %1;", "f", "f")
ONE(f32_rmi, float, float, "cvt.rmi.f32.f32 %0, %1;", "f", "f")
ONE(f32_rpi, float, float, "cvt.rpi.f32.f32 %0, %1;", "f", "f")
ONE(f64_rni, double, double, "cvt.rni.f64.f64 %0, %1;", "d", "d")
ONE(f16_rni, uint16_t, uint16_t, "cvt.rni.f16.f16 %0, %1;", "h", "h")
ONE(f16_rpi, uint16_t, uint16_t, "cvt.rpi.f16.f16 %0, %1;", "h", "h")
ONE(f32_ftz_sat, float, float, "cvt.ftz.sat.f32.f32 %0, %1;", "f", "f")
ONE(f32_f64_rm, float, double, "cvt.rm.f32.f64 %0, %1;", "f", "d")
ONE(f32_f64_rp, float, double, "cvt.rp.f32.f64 %0, %1;", "f", "d")
ONE(f32_f16_ftz, float, uint16_t, "cvt.ftz.f32.f16 %0, %1;", "f", "h")
ONE(f16_f32_sat, uint16_t, float, "cvt.rn.sat.f16.f32 %0, %1;", "h", "f")
ONE(f16_f32_relu, uint16_t, float, "cvt.rn.relu.f16.f32 %0, %1;", "h", "f")
ONE(tf32_f32_rn, uint32_t, float, "cvt.rn.tf32.f32 %0, %1;", "r", "f")
ONE(tf32_f32_rz_relu, uint32_t, float, "cvt.rz.relu.tf32.f32 %0, %1;", "r", "f")
TWO(bf16x2_f32_rz, uint32_t, float, "cvt.rz.bf16x2.f32 %0, %1, %2;", "r", "f")
TWO(bf16x2_f32_relu, uint32_t, float, "cvt.rn.relu.bf16x2.f32 %0, %1, %2;", "r", "f")
TWO(f16x2_f32_rz, uint32_t, float, "cvt.rz.f16x2.f32 %0, %1, %2;", "r", "f")
TWO(f16x2_f32_relu, uint32_t, float, "cvt.rn.relu.f16x2.f32 %0, %1, %2;", "r", "f")
TWO(e4m3x2_f32_relu, uint16_t, float, "cvt.rn.satfinite.relu.e4m3x2.f32 %0, %1, %2;", "h", "f")
TWO(e5m2x2_f32_relu, uint16_t, float, "cvt.rn.satfinite.relu.e5m2x2.f32 %0, %1, %2;", "h", "f")
ONE(f16x2_e4m3x2_relu, uint32_t, uint16_t, "cvt.rn.relu.f16x2.e4m3x2 %0, %1;", "r", "h")
ONE(u8_s32_sat, uint32_t, int32_t, "cvt.sat.u8.s32 %0, %1;", "r", "r")
ONE(s16_u32, int32_t, uint32_t, "{ .reg .b16 t; cvt.s16.u32 t, %1; cvt.s32.s16 %0, t; }", "r", "r")
ONE(s16_u32_sat, int32_t, uint32_t, "{ .reg .b16 t; cvt.sat.s16.u32 t, %1; cvt.s32.s16 %0, t; }", "r", "r")
ONE(u32_s64_sat, uint32_t, int64_t, "cvt.sat.u32.s64 %0, %1;", "r", "l")
ONE(s64_s32, int64_t, int32_t, "cvt.s64.s32 %0, %1;", "l", "r")
ONE(u64_s8, uint64_t, uint32_t, "{ .reg .b16 t; cvt.u16.u32 t, %1; cvt.u64.s8 %0, t; }", "l", "r")
TWO(pack_s8, uint32_t, int32_t, "cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0x12345678;", "r", "r")
TWO(pack_u8, uint32_t, int32_t, "{ .reg .b32 t; cvt.pack.sat.u8.s32.b32 t, %2, %1, 0; cvt.pack.sat.u8.s32.b32 %0, %1, %2, t; }", "r", "r")
TWO(pack_s16, uint32_t, int32_t, "cvt.pack.sat.s16.s32 %0, %1, %2;", "r", "r")
TWO(pack_u16, uint32_t, int32_t, "cvt.pack.sat.u16.s32 %0, %1, %2;", "r", "r")

#if __CUDA_ARCH__ >= 1000
TWO(e2m1x2_f32, uint16_t, float, "{ .reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, %1, %2; cvt.u16.u8 %0, t; }", "h", "f")
ONE(f16x2_e2m1x2, uint32_t, uint16_t, "{ .reg .b8 t; cvt.u8.u16 t, %1; cvt.rn.f16x2.e2m1x2 %0, t; }", "r", "h")
TWO(e2m3x2_f32, uint16_t, float, "cvt.rn.satfinite.e2m3x2.f32 %0, %1, %2;", "h", "f")
TWO(e3m2x2_f32, uint16_t, float, "cvt.rn.satfinite.e3m2x2.f32 %0, %1, %2;", "h", "f")
ONE(f16x2_e2m3x2, uint32_t, uint16_t, "cvt.rn.f16x2.e2m3x2 %0, %1;", "r", "h")
ONE(f16x2_e3m2x2, uint32_t, uint16_t, "cvt.rn.f16x2.e3m2x2 %0, %1;", "r", "h")
TWO(ue8m0x2_f32_rp, uint16_t, float, "cvt.rp.satfinite.ue8m0x2.f32 %0, %1, %2;", "h", "f")
TWO(ue8m0x2_f32_rz, uint16_t, float, "cvt.rz.satfinite.ue8m0x2.f32 %0, %1, %2;", "h", "f")
ONE(bf16x2_ue8m0x2, uint32_t, uint16_t, "cvt.rn.bf16x2.ue8m0x2 %0, %1;", "r", "h")
#endif
