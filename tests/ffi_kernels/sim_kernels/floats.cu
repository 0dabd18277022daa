// One kernel per floating-point instruction: d[i] = op(a[i], b[i], c[i]) in f32, f64, f16, bf16 and pairs.
#include <cstdint>

#define OP(name, T, Out, text, kind, out_kind)                                                  \
  struct name##_params { const T* a; const T* b; const T* c; Out* d; int n; };                  \
  extern "C" __global__ void name(const __grid_constant__ name##_params p) {                    \
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.n; i += gridDim.x * blockDim.x) { \
      Out d;                                                                                    \
      asm(text : "=" out_kind(d) : kind(p.a[i]), kind(p.b[i]), kind(p.c[i]));                   \
      p.d[i] = d;                                                                               \
    }                                                                                           \
  }
#define F(name, text) OP(name, float, float, text, "f", "f")
#define D(name, text) OP(name, double, double, text, "d", "d")
#define U(name, text) OP(name, uint32_t, uint32_t, text, "r", "r")
#define H(name, text) OP(name, uint16_t, uint16_t, text, "h", "h")
#define FU(name, text) OP(name, float, uint32_t, text, "f", "r")
#define DU(name, text) OP(name, double, uint32_t, text, "d", "r")
#define HU(name, text) OP(name, uint16_t, uint32_t, text, "h", "r")

// NAME_rn, NAME_rz, NAME_rm, NAME_rp, and of f64 the same with _d behind.
#define MODES(name, op, operands)                                                                                                 \
  F(name##_rn, op ".rn.f32 " operands) F(name##_rz, op ".rz.f32 " operands) F(name##_rm, op ".rm.f32 " operands) F(name##_rp, op ".rp.f32 " operands) \
  D(name##_rn_d, op ".rn.f64 " operands) D(name##_rz_d, op ".rz.f64 " operands) D(name##_rm_d, op ".rm.f64 " operands) D(name##_rp_d, op ".rp.f64 " operands)
#define ONE "%0, %1;"
#define TWO "%0, %1, %2;"
#define THREE "%0, %1, %2, %3;"
MODES(add, "add", TWO) MODES(sub, "sub", TWO) MODES(mul, "mul", TWO) MODES(fma, "fma", THREE) MODES(div, "div", TWO) MODES(rcp, "rcp", ONE) MODES(sqrt, "sqrt", ONE)

F(add_rn_ftz, "add.rn.ftz.f32 " TWO) F(sub_rz_ftz, "sub.rz.ftz.f32 " TWO) F(mul_rn_ftz, "mul.rn.ftz.f32 " TWO) F(fma_rn_ftz, "fma.rn.ftz.f32 " THREE) F(div_rn_ftz, "div.rn.ftz.f32 " TWO)
F(rcp_rn_ftz, "rcp.rn.ftz.f32 " ONE) F(sqrt_rn_ftz, "sqrt.rn.ftz.f32 " ONE) F(add_rn_sat, "add.rn.sat.f32 " TWO) F(sub_rm_sat, "sub.rm.sat.f32 " TWO) F(mul_rz_sat, "mul.rz.sat.f32 " TWO)
F(fma_rp_sat, "fma.rp.sat.f32 " THREE) F(fma_rn_ftz_sat, "fma.rn.ftz.sat.f32 " THREE)

#define LEAST(name, op)                                                                                                            \
  F(name, op ".f32 " TWO) F(name##_nan, op ".NaN.f32 " TWO) F(name##_flip, op ".xorsign.abs.f32 " TWO) F(name##_nan_flip, op ".NaN.xorsign.abs.f32 " TWO) \
  F(name##_ftz, op ".ftz.f32 " TWO) D(name##_d, op ".f64 " TWO)                                                                    \
  U(name##_h2, op ".f16x2 " TWO) U(name##_h2_nan, op ".NaN.f16x2 " TWO) U(name##_h2_flip, op ".xorsign.abs.f16x2 " TWO) U(name##_h2_ftz, op ".ftz.f16x2 " TWO) \
  U(name##_b2, op ".bf16x2 " TWO) U(name##_b2_nan, op ".NaN.bf16x2 " TWO) U(name##_b2_flip, op ".xorsign.abs.bf16x2 " TWO)
LEAST(least, "min") LEAST(most, "max")
F(abs_, "abs.f32 " ONE) F(abs_ftz, "abs.ftz.f32 " ONE) F(neg, "neg.f32 " ONE) F(neg_ftz, "neg.ftz.f32 " ONE) D(abs_d, "abs.f64 " ONE) D(neg_d, "neg.f64 " ONE)
F(copysign_, "copysign.f32 " TWO) D(copysign_d, "copysign.f64 " TWO)
U(abs_h2, "abs.f16x2 " ONE) U(neg_h2, "neg.f16x2 " ONE) U(abs_b2, "abs.bf16x2 " ONE) U(neg_b2, "neg.bf16x2 " ONE) U(neg_h2_ftz, "neg.ftz.f16x2 " ONE)

#define HALVES(name, op, operands)                                                                                       \
  U(name##_h2, op ".rn.f16x2 " operands) U(name##_b2, op ".rn.bf16x2 " operands) H(name##_h, op ".rn.f16 " operands) H(name##_b, op ".rn.bf16 " operands) \
  U(name##_h2_ftz, op ".rn.ftz.f16x2 " operands) U(name##_h2_sat, op ".rn.sat.f16x2 " operands)
HALVES(add, "add", TWO) HALVES(sub, "sub", TWO) HALVES(mul, "mul", TWO) HALVES(fma, "fma", THREE)
U(fma_h2_relu, "fma.rn.relu.f16x2 " THREE) U(fma_b2_relu, "fma.rn.relu.bf16x2 " THREE)

F(ex2, "ex2.approx.f32 " ONE) F(lg2, "lg2.approx.f32 " ONE) F(rsqrt_, "rsqrt.approx.f32 " ONE) F(sine, "sin.approx.f32 " ONE) F(cosine, "cos.approx.f32 " ONE) F(tanh_, "tanh.approx.f32 " ONE)
F(rcp_approx, "rcp.approx.f32 " ONE) F(sqrt_approx, "sqrt.approx.f32 " ONE) F(div_approx, "div.approx.f32 " TWO) F(div_full, "div.full.f32 " TWO)
U(ex2_h2, "ex2.approx.f16x2 " ONE) U(ex2_b2, "ex2.approx.ftz.bf16x2 " ONE) U(tanh_h2, "tanh.approx.f16x2 " ONE) U(tanh_b2, "tanh.approx.bf16x2 " ONE)

// Every comparison, a bit each.
#define BIT(compare, type, bit) " setp." compare type " p, %1, %2; selp.b32 t, " bit ", 0, p; or.b32 %0, %0, t;"
#define COMPARISONS(type)                                                                                                             \
  "{ .reg .pred p; .reg .b32 t; mov.b32 %0, 0;" BIT("eq", type, "1") BIT("ne", type, "2") BIT("lt", type, "4") BIT("le", type, "8") BIT("gt", type, "16") \
  BIT("ge", type, "32") BIT("equ", type, "64") BIT("neu", type, "128") BIT("ltu", type, "256") BIT("leu", type, "512") BIT("gtu", type, "1024") \
  BIT("geu", type, "2048") BIT("num", type, "4096") BIT("nan", type, "8192") "}"
FU(compare_f, COMPARISONS(".f32")) FU(compare_ftz, COMPARISONS(".ftz.f32")) DU(compare_d, COMPARISONS(".f64")) HU(compare_h, COMPARISONS(".f16")) HU(compare_b, COMPARISONS(".bf16"))
U(compare_h2, "{ .reg .pred p, q; .reg .b32 t; setp.ltu.f16x2 p|q, %1, %2; selp.b32 %0, 1, 0, p; selp.b32 t, 2, 0, q; or.b32 %0, %0, t; }")
U(set_h2, "set.ge.f16x2.f16x2 " TWO) U(set_b2, "set.neu.bf16x2.bf16x2 " TWO)
FU(set_f, "{ .reg .f32 x; set.leu.f32.f32 x, %1, %2; mov.b32 %0, x; }") FU(set_u, "set.gt.u32.f32 " TWO)
FU(setp_both, "{ .reg .pred p, q, r; setp.lt.f32 r, %3, 0f00000000; setp.ltu.and.f32 p|q, %1, %2, r; selp.b32 %0, 1, 2, p; @q add.u32 %0, %0, 4; }")
#define CLASS(what, type, bit) " testp." what type " p, %1; selp.b32 t, " bit ", 0, p; or.b32 %0, %0, t;"
#define CLASSES(type)                                                                                                      \
  "{ .reg .pred p; .reg .b32 t; mov.b32 %0, 0;" CLASS("finite", type, "1") CLASS("infinite", type, "2") CLASS("number", type, "4") \
  CLASS("notanumber", type, "8") CLASS("normal", type, "16") CLASS("subnormal", type, "32") "}"
FU(classes_f, CLASSES(".f32")) DU(classes_d, CLASSES(".f64"))
