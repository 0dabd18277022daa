// One kernel per arithmetic instruction: d[i] = op(a[i], b[i], c[i]).
#include <cstdint>

#define THREE(name, T, text, kind)                                                      \
  struct name##_params { const T* a; const T* b; const T* c; T* d; int n; };            \
  extern "C" __global__ void name(const __grid_constant__ name##_params p) {            \
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.n; i += gridDim.x * blockDim.x) { \
      T d;                                                                              \
      asm(text : "=" kind(d) : kind(p.a[i]), kind(p.b[i]), kind(p.c[i]));               \
      p.d[i] = d;                                                                       \
    }                                                                                   \
  }
#define F(name, text) THREE(name, float, text, "f")
#define D(name, text) THREE(name, double, text, "d")
#define U(name, text) THREE(name, uint32_t, text, "r")
#define L(name, text) THREE(name, uint64_t, text, "l")
#define H(name, text) THREE(name, uint16_t, text, "h")

F(add_rn, "add.rn.f32 %0, %1, %2;") F(add_rz, "add.rz.f32 %0, %1, %2;") F(add_rm, "add.rm.f32 %0, %1, %2;") F(add_rp, "add.rp.f32 %0, %1, %2;")
F(add_ftz, "add.ftz.f32 %0, %1, %2;") F(add_sat, "add.sat.f32 %0, %1, %2;") F(sub_rn, "sub.rn.f32 %0, %1, %2;")
F(mul_rn, "mul.rn.f32 %0, %1, %2;") F(mul_rz, "mul.rz.f32 %0, %1, %2;") F(mul_rp, "mul.rp.f32 %0, %1, %2;")
F(fma_rn, "fma.rn.f32 %0, %1, %2, %3;") F(fma_rz, "fma.rz.f32 %0, %1, %2, %3;") F(fma_rm, "fma.rm.f32 %0, %1, %2, %3;")
F(div_rn, "div.rn.f32 %0, %1, %2;") F(div_rz, "div.rz.f32 %0, %1, %2;") F(sqrt_rn, "sqrt.rn.f32 %0, %1;") F(rcp_rn, "rcp.rn.f32 %0, %1;")
F(min_f, "min.f32 %0, %1, %2;") F(max_nan, "max.NaN.f32 %0, %1, %2;") F(ex2, "ex2.approx.f32 %0, %1;") F(lg2, "lg2.approx.f32 %0, %1;")
F(rsqrt_, "rsqrt.approx.f32 %0, %1;") F(sine, "sin.approx.f32 %0, %1;") F(cosine, "cos.approx.f32 %0, %1;") F(tanh_, "tanh.approx.f32 %0, %1;")
D(dfma, "fma.rn.f64 %0, %1, %2, %3;") D(dadd_rz, "add.rz.f64 %0, %1, %2;") D(ddiv, "div.rn.f64 %0, %1, %2;")
U(mul_hi_u, "mul.hi.u32 %0, %1, %2;") U(mul_hi_s, "mul.hi.s32 %0, %1, %2;") U(mad_lo, "mad.lo.s32 %0, %1, %2, %3;") U(div_s, "div.s32 %0, %1, %2;")
U(rem_u, "rem.u32 %0, %1, %2;") U(sat_add, "add.sat.s32 %0, %1, %2;") U(sad, "sad.s32 %0, %1, %2, %3;") U(popc, "popc.b32 %0, %1;")
U(clz, "clz.b32 %0, %1;") U(brev, "brev.b32 %0, %1;") U(bfind_s, "bfind.s32 %0, %1;") U(bfe_s, "bfe.s32 %0, %1, %2, %3;")
U(bfe_u, "bfe.u32 %0, %1, %2, %3;") U(bfi, "{ .reg .b32 t; bfi.b32 %0, %1, 0x12345678, %2, %3; }") U(prmt, "prmt.b32 %0, %1, %2, %3;")
U(shf_l, "shf.l.wrap.b32 %0, %1, %2, %3;") U(shf_r, "shf.r.clamp.b32 %0, %1, %2, %3;") U(lop3, "lop3.b32 %0, %1, %2, %3, 0x96;")
U(dp4a, "dp4a.s32.u32 %0, %1, %2, %3;") U(dp2a, "dp2a.hi.s32.s32 %0, %1, %2, %3;") U(shl, "shl.b32 %0, %1, %3;") U(shr_s, "shr.s32 %0, %1, %3;")
U(min_s, "min.s32 %0, %1, %2;") U(abs_s, "abs.s32 %0, %1;") U(fns, "fns.b32 %0, %1, 7, 3;") U(vadd, "add.u16x2 %0, %1, %2;") U(vmin, "min.s16x2 %0, %1, %2;")
U(carry, "{ .reg .b32 t; add.cc.u32 t, %1, %2; addc.u32 %0, %3, 0; }") U(slct, "slct.s32.s32 %0, %1, %2, %3;")
L(wide_mul_hi, "mul.hi.u64 %0, %1, %2;") L(div_l, "div.s64 %0, %1, %2;") L(brev_l, "brev.b64 %0, %1;") L(mad_l, "mad.lo.u64 %0, %1, %2, %3;")
U(hadd2, "add.rn.f16x2 %0, %1, %2;") U(hmul2, "mul.rn.f16x2 %0, %1, %2;") U(hfma2, "fma.rn.f16x2 %0, %1, %2, %3;") U(hmax2, "max.f16x2 %0, %1, %2;")
U(badd2, "add.rn.bf16x2 %0, %1, %2;") U(bmul2, "mul.rn.bf16x2 %0, %1, %2;") U(bfma2, "fma.rn.bf16x2 %0, %1, %2, %3;") U(bfma2_relu, "fma.rn.relu.bf16x2 %0, %1, %2, %3;")
U(hex2, "ex2.approx.f16x2 %0, %1;") U(bneg2, "neg.bf16x2 %0, %1;")
U(setp_num, "{ .reg .pred p, q; .reg .f32 a, b; mov.b32 a, %1; mov.b32 b, %2; setp.ltu.f32 p|q, a, b; selp.b32 %0, 1, 2, p; @q add.u32 %0, %0, 4; }")
